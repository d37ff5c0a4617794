"""Grouped products in a loop over tiles of rows.

A tile that groups share is visited once for each of them: at most tiles + groups - 1 visits, of
which a loop makes those that there are.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from memtrain_kernels.target import current_target
from memtrain_kernels.varying import vary_alike, vary_as


class _Visits(NamedTuple):
    count: Array  # int32 []
    tile: Array  # int32 [V]
    group: Array  # int32 [V]
    starts: Array  # int32 [G], each group's first row
    ends: Array  # int32 [G], and the one after its last


def product(rows: Array, weights: Array, sizes: Array, dtype) -> Array:
    """See `memtrain_kernels.grouped.reference`."""
    count, length = len(rows), tile_rows(len(rows), len(sizes))
    rows = _whole_tiles(rows, length)
    visits = _visits(sizes, len(rows) // length, length)

    def visit(i, out):
        first, group = visits.tile[i] * length, visits.group[i]
        mine = _own_rows(visits, first, group, length)
        x = lax.dynamic_slice_in_dim(rows, first, length)
        w = lax.dynamic_index_in_dim(weights, group, keepdims=False)
        y = jnp.matmul(x, w, preferred_element_type=dtype)
        before = lax.dynamic_slice_in_dim(out, first, length)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(mine, y, before), first, 0)

    out = jnp.zeros((len(rows), weights.shape[2]), dtype)
    return _loop(visits, visit, out, rows, weights)[:count]


def outer(rows: Array, d_out: Array, sizes: Array, dtype) -> Array:
    """See `memtrain_kernels.grouped.reference`."""
    length = tile_rows(len(rows), len(sizes))
    rows, d_out = _whole_tiles(rows, length), _whole_tiles(d_out, length)
    visits = _visits(sizes, len(rows) // length, length)

    def visit(i, total):
        first, group = visits.tile[i] * length, visits.group[i]
        mine = _own_rows(visits, first, group, length)
        x = lax.dynamic_slice_in_dim(rows, first, length)
        dy = lax.dynamic_slice_in_dim(d_out, first, length)
        # Both: what is no number in a row of another would be none times nothing either.
        x, dy = jnp.where(mine, x, 0), jnp.where(mine, dy, 0)
        own = jnp.matmul(x.T, dy, preferred_element_type=dtype)
        before = lax.dynamic_index_in_dim(total, group, keepdims=False)
        return lax.dynamic_update_index_in_dim(total, before + own, group, 0)

    total = jnp.zeros((len(sizes), rows.shape[1], d_out.shape[1]), dtype)
    return _loop(visits, visit, total, rows, d_out)


def tile_rows(count: int, groups: int) -> int:
    """Rows of a tile: about half a group's, so that few are visited in vain; a power of two."""
    most = 256 if current_target().platform == "cpu" else 512
    length = 8
    while 2 * length <= most and 4 * length * groups <= count:
        length *= 2
    return length


def _whole_tiles(rows: Array, length: int) -> Array:
    return jnp.pad(rows, ((0, -len(rows) % length), (0, 0)))


def _visits(sizes: Array, tiles: int, length: int) -> _Visits:
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    first = starts // length
    each = jnp.where(sizes > 0, (ends - 1) // length - first + 1, 0)
    done = jnp.cumsum(each)
    visit = jnp.arange(tiles + len(sizes) - 1)
    group = jnp.minimum(jnp.searchsorted(done, visit, side="right"), len(sizes) - 1)
    tile = first[group] + visit - (done - each)[group]
    return _Visits(done[-1], tile.astype(jnp.int32), group.astype(jnp.int32), starts, ends)


def _own_rows(visits: _Visits, first: Array, group: Array, length: int) -> Array:
    """Which rows of a tile are the group's, [length, 1]."""
    row = first + jnp.arange(length)
    return ((row >= visits.starts[group]) & (row < visits.ends[group]))[:, None]


def _loop(visits: _Visits, visit, start: Array, *operands: Array) -> Array:
    start, *_ = vary_alike(start, *operands, visits.starts)
    if current_target().platform == "cpu":
        return lax.fori_loop(jnp.zeros_like(visits.count), visits.count, visit, start)

    # A count that the host must wait for at every turn costs more than visits in vain, of which no
    # row is the group's.
    def step(carry, i):
        return visit(i, carry), None

    steps = vary_as(jnp.arange(len(visits.tile)), start)
    return lax.scan(step, start, steps)[0]
