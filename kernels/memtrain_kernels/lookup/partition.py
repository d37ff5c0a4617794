"""Memory lookups under automatic sharding: tokens stay where they are, and so does the table.

Left to itself, XLA gathers the scores of all tokens on every device before a top-k, gathers the
slots of all tokens and adds up an array of all tokens, or gathers the whole table. Where the
program says how they are sharded, lookups are put under `jax.shard_map`, as
`memtrain_kernels.partition` does with attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from memtrain_kernels.announce import say_once
from memtrain_kernels.lookup.checks import Arrays
from memtrain_kernels.lookup.product_key_lookup import product_key_lookup
from memtrain_kernels.lookup.sharded_gather import EXCHANGES, sharded_weighted_gather
from memtrain_kernels.lookup.weighted_gather import weighted_gather
from memtrain_kernels.partition import Partition, current_partition


@dataclass(frozen=True)
class TableAxes:
    """The mesh axes that split the rows and the columns of memory tables, the slowest first."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    exchange: Literal["auto", "all_to_all", "gather"] = "auto"


# Part of the key under which jit keeps programs, as the partition is.
_tables = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def tables_over(
    *,
    rows: tuple[str, ...] = (),
    columns: tuple[str, ...] = (),
    exchange: Literal["auto", "all_to_all", "gather"] = "auto",
) -> Iterator[None]:
    """While a program is traced inside, memory tables [N, V] are read where they lie on the mesh.

    rows, columns: the mesh axes over which tables are sharded. exchange: see
    `sharded_weighted_gather`. Takes effect together with `partitioned`, which names the mesh and
    the axes of tokens. Raises ValueError for an axis that splits both, or an unknown exchange.
    """
    if both := set(rows) & set(columns):
        raise ValueError(f"mesh axis {min(both)!r} splits rows and columns: give it once")
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange={exchange!r}: give one of {', '.join(EXCHANGES)}")
    with _tables(TableAxes(tuple(rows), tuple(columns), exchange)):
        yield


def partitioned_weighted_gather(
    table: Arrays, slots: Arrays, weights: Arrays, *, table_gradient: bool = True
) -> jax.Array:
    """y[b, t] = sum_k weights[b, t, k] * table[slots[b, t, k]], sharded as the program says.

    Shapes: table [N, V]; slots, weights [B, T, K]; returns [B, T, V] in the table's dtype. Under
    `partitioned` and `tables_over`, rows go between the devices over which both tokens and table
    are sharded, by `sharded_weighted_gather`; columns over axes that do not split tokens stay
    sharded in the result. Otherwise it is `weighted_gather`. Axes that do not divide the table
    leave it whole, which is said once. table_gradient: see `weighted_gather`. Raises ValueError for
    shapes that do not fit, for axes that the mesh has not, and where rows and columns would both
    have to be exchanged.
    """
    if slots.ndim != 3 or weights.shape != slots.shape:
        raise ValueError(f"slots {slots.shape} and weights {weights.shape}: give both [B, T, K]")
    part, axes = current_partition(), _tables.value
    outer = set(jax.sharding.get_abstract_mesh().manual_axes)
    if part is None or axes is None or part.mesh.size == 1 or outer == set(part.mesh.shape):
        flat = [x.reshape(-1, x.shape[-1]) for x in (slots, weights)]
        y = weighted_gather(table, *flat, table_gradient=table_gradient)
        return y.reshape(*slots.shape[:2], -1)
    B, T, K = slots.shape
    batch, sequence = _token_axes(part, outer, B, T)
    of_tokens = {*(batch or ()), *(sequence or ())}
    rows = _dividing(part, _without(outer, axes.rows), "rows", table.shape[0])
    columns = _dividing(part, _without(outer, axes.columns), "columns", table.shape[1])
    # Columns on devices that have the same tokens need no exchange: the result is sharded as they.
    kept = tuple(n for n in columns if n not in of_tokens)
    exchanged = tuple(n for n in columns if n in of_tokens)
    if rows and exchanged:
        raise ValueError(
            f"the table's columns are split over {', '.join(exchanged)} as tokens are, and its "
            f"rows over {', '.join(rows)}: give one of them"
        )

    def read(table_NV: jax.Array, slots_BTK: jax.Array, weights_BTK: jax.Array) -> jax.Array:
        flat = [x.reshape(-1, K) for x in (slots_BTK, weights_BTK)]
        if rows:
            y = sharded_weighted_gather(
                table_NV,
                *flat,
                axis=rows,
                split="rows",
                exchange=axes.exchange,
                table_gradient=table_gradient,
            )
        elif exchanged:
            y = sharded_weighted_gather(
                table_NV, *flat, axis=exchanged, split="columns", table_gradient=table_gradient
            )
        else:
            y = weighted_gather(table_NV, *flat, table_gradient=table_gradient)
        return y.reshape(*slots_BTK.shape[:2], -1)

    tokens = PartitionSpec(batch, sequence, None)
    return jax.shard_map(
        read,
        **_over(part, outer),
        # Kept columns are the slower ones, so that those of one device lie together in the result.
        in_specs=(PartitionSpec(rows or None, (*kept, *exchanged) or None), tokens, tokens),
        out_specs=PartitionSpec(batch, sequence, kept or None),
        check_vma=False,  # tokens that an axis of the table does not split come out alike on it
    )(jnp.asarray(table), jnp.asarray(slots), jnp.asarray(weights))


def partitioned_product_key_lookup(
    queries: Arrays, half_keys: Arrays, top_k: int
) -> tuple[jax.Array, jax.Array]:
    """`product_key_lookup` of queries [B, T, H, 2, D], of each device's own tokens and heads.

    Under `partitioned`; otherwise it is `product_key_lookup`.
    """
    part = current_partition()
    outer = set(jax.sharding.get_abstract_mesh().manual_axes)
    if part is None or part.mesh.size == 1 or outer == set(part.mesh.shape):
        return product_key_lookup(queries, half_keys, top_k)
    B, T, H, _, _ = queries.shape
    heads = part.axes(_without(outer, part.heads), H)
    found = PartitionSpec(*_token_axes(part, outer, B, T), heads, None)
    return jax.shard_map(
        lambda q, keys: product_key_lookup(q, keys, top_k),
        **_over(part, outer),
        in_specs=(PartitionSpec(*found, None), PartitionSpec(None, heads)),
        out_specs=(found, found),
        check_vma=False,
    )(jnp.asarray(queries), jnp.asarray(half_keys))


def _token_axes(
    part: Partition, outer: set[str], batch: int, length: int
) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """The axes that split the rows and the sequence of [batch, length] tokens."""
    sequence = _without(outer, part.sequence)
    return part.axes(_without(outer, part.batch), batch), part.axes(sequence, length)


def _over(part: Partition, outer: set[str]) -> dict[str, Any]:
    # Inside a shard_map over some axes only, what is left to split is split in one over the rest.
    return {"axis_names": set(part.mesh.axis_names) - outer} if outer else {"mesh": part.mesh}


def _without(outer: set[str], names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    names = (names,) if isinstance(names, str) else names or ()
    return tuple(n for n in names if n not in outer)


def _dividing(part: Partition, names: tuple[str, ...], what: str, size: int) -> tuple[str, ...]:
    """The axes of these that together divide the table's rows or columns."""
    for name in names:
        if name not in part.mesh.shape:
            raise ValueError(f"mesh axis {name!r}: the mesh has {', '.join(part.mesh.shape)}")
    kept = part.axes(names, size) or ()
    left = [n for n in names if n not in kept and part.mesh.shape[n] > 1]
    if left:
        of = " x ".join(f"{n}={part.mesh.shape[n]}" for n in (*kept, *left))
        say_once(
            f"memory table: {size} {what} are not a multiple of {of}: "
            f"not split over {', '.join(left)}"
        )
    return kept
