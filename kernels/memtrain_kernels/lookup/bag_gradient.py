"""Gradients of a bag, y[m] = sum_k weights[m, k] * table[slots[m, k]], for table and weights.

The table's gradient adds weights[m, k] * dy[m] to row slots[m, k], for M * K pairs of which many
may name one row. Two forms, both of a fixed order of additions:
- `scatter`: one scatter-add a column of slots. XLA on CPU runs it in order, one thread, in place.
- `sorted_runs`: where a scatter-add is atomic (GPU), or slow (TPU). The pairs are sorted by row,
  stably; the sum of each run of equal rows is made by itself, never as the difference of two
  running totals, and written once.
Neither forms the [M, K, D] rows. A negative slot is no row.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from memtrain_kernels.host import is_on_host, run_on_host
from memtrain_kernels.varying import vary_as


# Pairs that one lane of `sorted_runs` adds up in turn: the sums in flight are M * K / 32 rows.
_CHUNK = 32


def accumulation_dtype(*arrays: jax.Array) -> jnp.dtype:
    """float32, or float64 where an array is."""
    wide = any(x.dtype == jnp.float64 for x in arrays)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def sum_by_row(
    slots_MK: jax.Array, weights_MK: jax.Array, dy_MD: jax.Array, num_rows: int
) -> jax.Array:
    """sum of weights[m, k] * dy[m] over all pairs of each row: [num_rows, D], float32."""
    return lax.platform_dependent(
        slots_MK,
        weights_MK,
        dy_MD,
        cpu=functools.partial(scatter, num_rows=num_rows),
        default=functools.partial(sorted_runs, num_rows=num_rows),
    )


def weights_gradient(table_ND: jax.Array, slots_MK: jax.Array, dy_MD: jax.Array) -> jax.Array:
    """dy[m] . table[slots[m, k]]: [M, K], float32, on the device; 0 where a slot is negative."""
    dtype = accumulation_dtype(table_ND, dy_MD)
    dy_MD = dy_MD.astype(dtype)
    if is_on_host(table_ND):
        dots_MK = run_on_host(_dots, table_ND, jnp.maximum(slots_MK, 0), dy_MD)
        return jnp.where(slots_MK < 0, 0, dots_MK)

    def column(slots_M: jax.Array) -> jax.Array:
        # Kept apart: XLA on CPU runs a gather inside a sum several times slower.
        rows_MD = lax.optimization_barrier(table_ND[jnp.maximum(slots_M, 0)])
        return jnp.sum(dy_MD * rows_MD.astype(dtype), axis=-1)

    def by_columns(slots_MK: jax.Array) -> jax.Array:
        return lax.map(column, slots_MK.T).T

    def at_once(slots_MK: jax.Array) -> jax.Array:
        rows_MKD = table_ND[jnp.maximum(slots_MK, 0)]  # fused into the sum: never in memory
        return jnp.sum(dy_MD[:, None] * rows_MKD.astype(dtype), axis=-1)

    # On TPU the gathered rows would not be fused.
    dots_MK = lax.platform_dependent(slots_MK, cpu=by_columns, tpu=by_columns, default=at_once)
    return jnp.where(slots_MK < 0, 0, dots_MK)


def _dots(table_ND: jax.Array, slots_MK: jax.Array, dy_MD: jax.Array) -> jax.Array:
    """[M, K], as a host takes it."""
    columns = [
        jnp.sum(dy_MD * table_ND[slots_MK[:, k]].astype(dy_MD.dtype), axis=-1)
        for k in range(slots_MK.shape[1])
    ]
    return jnp.stack(columns, axis=1)


def scatter(
    slots_MK: jax.Array, weights_MK: jax.Array, dy_MD: jax.Array, *, num_rows: int
) -> jax.Array:
    """`sum_by_row`, adding in the order of columns, then rows."""
    dtype = accumulation_dtype(dy_MD)
    dy_MD = dy_MD.astype(dtype)
    slots_MK = jnp.where(slots_MK < 0, num_rows, slots_MK)

    def column(total_ND: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        slots_M, weights_M = pair
        shares_MD = weights_M[:, None].astype(dtype) * dy_MD
        return total_ND.at[slots_M].add(shares_MD, mode="drop"), None

    # A loop, not written out: only so is the total updated in place.
    zeros = vary_as(jnp.zeros((num_rows, dy_MD.shape[1]), dtype), dy_MD)
    return lax.scan(column, zeros, (slots_MK.T, weights_MK.T))[0]


def sorted_runs(
    slots_MK: jax.Array, weights_MK: jax.Array, dy_MD: jax.Array, *, num_rows: int
) -> jax.Array:
    """`sum_by_row`, each row's sum in the order of m, then k, in chunks of the sorted pairs.

    The sorted pairs are cut into Q chunks of C. The sum of a run that goes on from the chunk before
    starts with a carry, found by a scan over the chunks' last runs; all chunks then go through
    their pairs side by side, and write where a run ends.
    """
    dtype = accumulation_dtype(dy_MD)
    dy_MD = dy_MD.astype(dtype)
    slot_P, m_P, weight_P = _sort_pairs(slots_MK, weights_MK.astype(dtype), num_rows)
    chunk = min(_CHUNK, slot_P.size)
    missing = -slot_P.size % chunk

    def chunks(x_P: jax.Array, fill: int) -> jax.Array:
        return jnp.pad(x_P, (0, missing), constant_values=fill).reshape(-1, chunk)

    slot_QC, m_QC, weight_QC = chunks(slot_P, num_rows), chunks(m_P, 0), chunks(weight_P, 0)
    nowhere = jnp.full((1, 1), -1, slot_QC.dtype)
    before_QC = jnp.concatenate([nowhere, slot_QC.reshape(1, -1)[:, :-1]], 1).reshape(-1, chunk)
    after_QC = jnp.concatenate([slot_QC.reshape(1, -1)[:, 1:], nowhere], 1).reshape(-1, chunk)

    def share(c: jax.Array) -> jax.Array:
        return _at(weight_QC, c)[:, None] * dy_MD[_at(m_QC, c)]

    def add_to_tail(c: jax.Array, tail_QD: jax.Array) -> jax.Array:
        in_last_run_Q = _at(slot_QC, c) == slot_QC[:, -1]
        return tail_QD + jnp.where(in_last_run_Q[:, None], share(c), 0)

    tail_QD = vary_as(jnp.zeros((slot_QC.shape[0], dy_MD.shape[1]), dtype), dy_MD)
    tail_QD = lax.fori_loop(0, chunk, add_to_tail, tail_QD, unroll=min(4, chunk))
    is_joined_Q = slot_QC[:, 0] == before_QC[:, 0]
    is_one_run_Q = slot_QC[:, 0] == slot_QC[:, -1]
    carry_QD = _carries(is_joined_Q & is_one_run_Q, tail_QD)

    # Ends of runs have one target each; whoever ends no run gets one outside the table.
    outside_Q = num_rows + lax.iota(jnp.int32, slot_QC.shape[0])

    def step(c: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total_ND, sum_QD = state
        slot_Q = _at(slot_QC, c)
        goes_on_Q = slot_Q == _at(before_QC, c)
        sum_QD = jnp.where(goes_on_Q[:, None], sum_QD, 0) + share(c)
        ends_Q = (slot_Q != _at(after_QC, c)) & (slot_Q < num_rows)
        target_Q = jnp.where(ends_Q, slot_Q, outside_Q)
        return total_ND.at[target_Q].set(sum_QD, mode="drop", unique_indices=True), sum_QD

    zeros = vary_as(jnp.zeros((num_rows, dy_MD.shape[1]), dtype), dy_MD)
    return lax.fori_loop(0, chunk, step, (zeros, carry_QD))[0]


def _carries(goes_through_Q: jax.Array, tail_QD: jax.Array) -> jax.Array:
    """What the chunks before each chunk add up to in the run that they end in: [Q, D].

    goes_through_Q: whether a chunk is of one run, which the chunk before it ends in. tail_QD: the
    sum of a chunk's own last run.
    """

    def after(
        one: tuple[jax.Array, jax.Array], two: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        (through_1, sum_1), (through_2, sum_2) = one, two
        return through_1 & through_2, jnp.where(through_2[:, None], sum_1 + sum_2, sum_2)

    _, sum_QD = lax.associative_scan(after, (goes_through_Q, tail_QD))
    return jnp.concatenate([jnp.zeros_like(sum_QD[:1]), sum_QD[:-1]])


def _sort_pairs(
    slots_MK: jax.Array, weights_MK: jax.Array, num_rows: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The pairs in the order of slot, then m, then k: slots, m, weights [M * K]. No row comes last,
    as slot num_rows."""
    M, K = slots_MK.shape
    slots_P = jnp.where(slots_MK < 0, num_rows, slots_MK).astype(jnp.int32).reshape(-1)
    slots_P, pair_P = lax.sort(
        (slots_P, vary_as(lax.iota(jnp.int32, M * K), slots_P)), num_keys=1, is_stable=True
    )
    return slots_P, pair_P // K, weights_MK.reshape(-1)[pair_P]


def _at(x_QC: jax.Array, c: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(x_QC, c, axis=1, keepdims=False)
