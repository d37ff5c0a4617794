"""The embedding bag over a table that is sharded over a mesh axis."""

from __future__ import annotations

import functools
from typing import Literal, cast

import jax
import jax.numpy as jnp
from jax import lax

from memtrain_kernels.lookup.bag_gradient import accumulation_dtype
from memtrain_kernels.lookup.checks import Arrays, check_bag, check_count
from memtrain_kernels.lookup.exchange import Columns, Exchange, MaskedRows
from memtrain_kernels.lookup.gather_costs import Route, gather_costs, plan_chunks
from memtrain_kernels.lookup.requests import Requests
from memtrain_kernels.lookup.weighted_gather import weighted_gather
from memtrain_kernels.varying import vary_alike, vary_as


SPLITS = ("rows", "columns")
EXCHANGES = ("auto", "all_to_all", "gather")


def sharded_weighted_gather(
    table: Arrays,
    slots: Arrays,
    weights: Arrays,
    *,
    axis: str | tuple[str, ...],
    split: Literal["rows", "columns"],
    exchange: Literal["auto", "all_to_all", "gather"] = "auto",
    chunk_tokens: int | None = None,
    table_gradient: bool = True,
) -> jax.Array:
    """`weighted_gather` inside `jax.shard_map`, with the table sharded over the mesh axis `axis`.

    Every device reads for its own tokens, out of the rows or columns of all. Tokens are served in
    chunks, so that temporaries do not grow with them, forward and backward.
    Args:
        table: the device's rows [N / n, V] or columns [N, V / n], n being the devices of the axis.
        slots: integers [M, K], rows of the whole table, of the device's own tokens; a negative one
            is no row. weights: [M, K].
        axis: a mesh axis, or several as one, the first being the slowest.
        split: what of the table a device has.
        exchange: how rows are read. "gather": every device is given the slots of all tokens and
            sums what is its own; "all_to_all": every read goes to the device that has the row, in
            as many rounds as the fullest needs; "auto": whichever sends less (`gather_costs`).
            Columns have one way, "gather".
        chunk_tokens: tokens of a device in one chunk, instead of as many as bound the temporaries.
        table_gradient: see `weighted_gather`.
    Returns:
        [M, V] in the table's dtype, summed in float32. Gradients: the device's own rows or columns
        get the sums over the tokens of all devices of the axis, of a fixed order, without atomics;
        over axes that replicate the table they are summed by `shard_map`.
    Raises ValueError for shapes, dtypes and choices that do not fit.
    """
    check_bag(slots, weights, table=table)
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: give one of {', '.join(SPLITS)}")
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange={exchange!r}: give one of {', '.join(EXCHANGES)}")
    if split == "columns" and exchange == "all_to_all":
        raise ValueError('exchange="all_to_all" is for rows: columns take "auto" or "gather"')
    if chunk_tokens is not None:
        check_count("chunk_tokens", chunk_tokens, 1, None)
    axis = (axis,) if isinstance(axis, str) else tuple(axis)
    n = lax.axis_size(axis)
    if n * table.shape[0] >= 2**31:
        raise ValueError(f"the table has {n * table.shape[0]} rows: give less than 2**31")
    slots = jnp.asarray(slots, jnp.int32)
    if n == 1 or not slots.shape[0]:
        y = weighted_gather(table, slots, weights, table_gradient=table_gradient)
        width = y.shape[1] * (n if split == "columns" else 1)
        return y if y.shape[1] == width else jnp.zeros((0, width), y.dtype)
    table, slots, weights, _ = vary_alike(
        jnp.asarray(table), slots, jnp.asarray(weights), lax.axis_index(axis)
    )
    route = _route(table, slots, n, split, exchange)
    M, K = slots.shape
    V = table.shape[1] * (n if split == "columns" else 1)
    shard_bytes = table.size * table.dtype.itemsize
    chunks = plan_chunks(route, M, shard_bytes, V, K, n, chunk_tokens)
    by: Exchange
    if route == "columns":
        by = Columns(axis)
    elif route == "rows_gather":
        by = MaskedRows(axis)
    else:
        everywhere = tuple(jax.sharding.get_abstract_mesh().manual_axes)
        by = Requests(axis, n, chunks.lanes, chunks.capacity, everywhere)
    return _gather(by, chunks.tokens, table_gradient, table, slots, weights)


def _route(table, slots, n: int, split: str, exchange: str) -> Route:
    if split == "columns":
        return "columns"
    if exchange != "auto":
        return cast(Route, f"rows_{exchange}")
    (rows, V), (M, K) = table.shape, slots.shape
    costs = gather_costs(M, n * rows, V, K, n, table.dtype.itemsize)
    routes: tuple[Route, Route] = ("rows_all_to_all", "rows_gather")
    return min(routes, key=lambda route: sum(costs[route]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gather(
    by: Exchange,
    chunk: int,
    table_gradient: bool,
    table_NV: jax.Array,
    slots_MK: jax.Array,
    weights_MK: jax.Array,
) -> jax.Array:
    def read(arrays):
        return by.read(table_NV, *arrays).astype(table_NV.dtype)

    cut = _cut(chunk, (slots_MK, -1), (weights_MK, 0))
    y_QCV = lax.map(read, cut) if cut[0].shape[0] > 1 else read([x[0] for x in cut])[None]
    return y_QCV.reshape(-1, y_QCV.shape[-1])[: slots_MK.shape[0]]


def _forward(by, chunk, table_gradient, table, slots, weights):
    return _gather(by, chunk, table_gradient, table, slots, weights), (table, slots, weights)


def _backward(by, chunk, table_gradient, saved, dy_MV):
    table_NV, slots_MK, weights_MK = saved

    def push(total_NV, arrays):
        return by.push(total_NV, table_NV, *arrays)

    zeros = None
    if table_gradient:
        zeros = vary_as(jnp.zeros(table_NV.shape, accumulation_dtype(table_NV, dy_MV)), table_NV)
    cut = _cut(chunk, (slots_MK, -1), (weights_MK, 0), (dy_MV, 0))
    if cut[0].shape[0] > 1:
        total_NV, d_weights = lax.scan(push, zeros, cut)
    else:
        total_NV, d_weights = push(zeros, [x[0] for x in cut])
    d_weights = d_weights.reshape(-1, slots_MK.shape[1])[: slots_MK.shape[0]]
    d_table = None if total_NV is None else total_NV.astype(table_NV.dtype)
    return d_table, None, d_weights.astype(weights_MK.dtype)


_gather.defvjp(_forward, _backward)


def _cut(chunk: int, *arrays: tuple[jax.Array, int]) -> list[jax.Array]:
    """Arrays [M, ...], each with what fills it up, in chunks: [Q, chunk, ...]."""
    cut = []
    for x_M, fill in arrays:
        missing = [(0, -x_M.shape[0] % chunk)] + [(0, 0)] * (x_M.ndim - 1)
        x_M = jnp.pad(x_M, missing, constant_values=fill)
        cut.append(x_M.reshape(-1, chunk, *x_M.shape[1:]))
    return cut
