"""A bag's table gradient as the rows that were touched: what a row-sparse optimizer reads."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memtrain_kernels.lookup.bag_gradient import sum_by_row
from memtrain_kernels.lookup.checks import Arrays, check_bag, check_count, host_value
from memtrain_kernels.varying import vary_alike, vary_as


NO_ROW = 2**31 - 1
"""The id of an unused entry of `RowGradients`: beyond every table, so a scatter may drop it."""


class RowGradients(NamedTuple):
    """Gradient rows of a table, one for each row that was touched. A pytree of static shape.

    ids: int32 [U], ascending and distinct; NO_ROW (2**31 - 1) in the entries after the first count.
    rows: float32 [U, D], 0 in those entries.
    count: int32 scalar, how many rows were touched. Beyond U they did not fit: all of `rows` is NaN
        then, so that no optimizer takes a part for the whole.
    """

    ids: jax.Array
    rows: jax.Array
    count: jax.Array

    def to_dense(self, num_rows: int) -> jax.Array:
        """The gradient as a table: [num_rows, D] float32, 0 where no row was touched.

        Raises ValueError if the ids can be read and do not fit.
        """
        check_count("num_rows", num_rows, 1, None)
        ids = host_value(self.ids)
        if ids is not None:
            used = ids[ids != NO_ROW]
            if used.size and used.max() >= num_rows:
                raise ValueError(f"num_rows={num_rows} is too few: row {used.max()} was touched")
        ids, rows = vary_alike(self.ids, self.rows)
        # Unused entries get targets of their own outside: each target is then unique.
        outside = num_rows + lax.iota(jnp.int32, ids.shape[0])
        target = jnp.where(ids < num_rows, ids, outside)
        zeros = vary_as(jnp.zeros((num_rows, rows.shape[1]), rows.dtype), rows)
        return zeros.at[target].set(rows, mode="drop", unique_indices=True)


def weighted_gather_row_gradients(
    slots: Arrays, weights: Arrays, dy: Arrays, *, max_rows: int | None = None
) -> RowGradients:
    """The gradient that `weighted_gather` passes to its table, as (ids, rows, count).

    For tables too large for a dense gradient: hold the table under `lax.stop_gradient`, add a zero
    to the bag's output, and differentiate by that zero: its gradient is dy.

    Args:
        slots: integers [M, K]; a negative one is no row. weights: [M, K]. dy: [M, D], the gradient
            of the bag's output.
        max_rows: the result has U = min(max_rows, M * K) entries; None is M * K. Give the number of
            rows of the table where that is less: it always suffices.
    Returns `RowGradients`; sums are float32 and of a fixed order. Raises ValueError for shapes and
    dtypes that do not fit.
    """
    check_bag(slots, weights, dy=dy)
    if max_rows is not None:
        check_count("max_rows", max_rows, 1, None)
    slots_MK, weights_MK, dy_MD = vary_alike(
        jnp.asarray(slots, jnp.int32), jnp.asarray(weights), jnp.asarray(dy)
    )
    U = slots_MK.size if max_rows is None else min(max_rows, slots_MK.size)
    ids, places, count = _number_rows(slots_MK.reshape(-1), U)
    # The place of a row in the result stands in for its slot: what did not fit is no row.
    rows = sum_by_row(places.reshape(slots_MK.shape), weights_MK, dy_MD, U)
    return RowGradients(ids, jnp.where(count > U, jnp.nan, rows), count)


def merge_row_gradients(*parts: RowGradients, max_rows: int | None = None) -> RowGradients:
    """The sum of several gradients of one table (layers that share it): one entry a row.

    Rows add up in the order of the arguments. max_rows: the result is no longer than this, nor than
    the parts together. A part that did not hold all its rows makes the result NaN too.
    """
    if not parts:
        raise ValueError("merge_row_gradients got no parts: give at least one RowGradients")
    widths = {part.rows.shape[1] for part in parts}
    if len(widths) > 1:
        raise ValueError(f"the parts' rows have widths {sorted(widths)}: give parts of one table")
    ids = jnp.concatenate([part.ids for part in parts])
    rows = jnp.concatenate([part.rows for part in parts])
    merged = weighted_gather_row_gradients(
        jnp.where(ids == NO_ROW, -1, ids)[:, None],
        jnp.ones((ids.shape[0], 1), rows.dtype),
        rows,
        max_rows=max_rows,
    )
    spoilt = jnp.any(jnp.stack([part.count > part.ids.shape[0] for part in parts]))
    return merged._replace(rows=jnp.where(spoilt, jnp.nan, merged.rows))


def _number_rows(slots_P: jax.Array, U: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The distinct non-negative slots ascending, [U]; each pair's place among them, -1 for none or
    one beyond U, [P]; their number."""
    P = slots_P.shape[0]
    none = vary_as(jnp.full((1,), NO_ROW, jnp.int32), slots_P)
    slots_P = jnp.where(slots_P < 0, NO_ROW, slots_P)
    iota_P = vary_as(lax.iota(jnp.int32, P), slots_P)
    sorted_P, pair_P = lax.sort((slots_P, iota_P), num_keys=1, is_stable=True)
    is_row_P = sorted_P != NO_ROW
    begins_P = is_row_P & (sorted_P != jnp.concatenate([none, sorted_P[:-1]]))
    place_P = jnp.cumsum(begins_P, dtype=jnp.int32) - 1
    count = place_P[-1] + 1
    target_P = jnp.where(begins_P, place_P, U + iota_P)
    ids_U = vary_as(jnp.full((U,), NO_ROW, jnp.int32), slots_P)
    ids_U = ids_U.at[target_P].set(sorted_P, mode="drop", unique_indices=True)
    place_P = jnp.where(is_row_P & (place_P < U), place_P, -1)
    places_P = jnp.zeros_like(place_P).at[pair_P].set(place_P, unique_indices=True)
    return ids_U, places_P, count
