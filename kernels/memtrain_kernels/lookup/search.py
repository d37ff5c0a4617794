"""The search itself: blocks of scores, and the best of each merged into a running list.

Axes as in key_blocks; D key dim, Q blocks of queries, k picks. A running list holds the scores of
every query row, best first, and the ranks of their keys. Of equal scores the lower rank comes
first: blocks come in the order of ranks, a list goes before the block that it is merged with, and
every selection is stable.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memtrain_kernels.lookup.key_blocks import (
    Block,
    Keys,
    Lane,
    Order,
    cut,
    order_keys,
    slots_of,
)
from memtrain_kernels.lookup.topk import candidates
from memtrain_kernels.target import current_target
from memtrain_kernels.varying import vary_as


MaskFn = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


class _Tile(NamedTuple):
    rows: int
    keys: int  # most keys of a block
    scores: int


# Measured: scores and keys that stay in the cache.
_TILE_CPU = _Tile(rows=64, keys=2**15, scores=2**21)
# Enough scores to keep the device busy: 128 MiB at most.
_TILE = _Tile(rows=1024, keys=2**17, scores=2**25)
# Where a mask says which positions it reaches, of the keys that a call brings itself a query sees
# those before it, or a band of these: so many blocks at least, and at most so many keys. Measured:
# smaller ones are skipped more closely and cost more in merging than that saves.
_BAND_BLOCKS, _BAND_KEYS = 4, 4096
# However many batches and heads there are: with fewer rows of each, a tile is no matrix product.
_MIN_ROWS, _MIN_KEYS = 16, 512


@dataclass(frozen=True)
class Plan:
    """What of a search is fixed when it is compiled."""

    top_k: int
    group: int  # query heads of a key head
    block_queries: int  # tokens
    block_keys: int
    by_lane: bool  # batches and heads one after another: XLA on CPU runs those products faster
    sorts: bool  # positions were given: they say which of two equal scores comes first
    mask_fn: MaskFn | None


class Queries(NamedTuple):
    rows: jax.Array  # [N, K, R, D]
    positions: jax.Array | None  # int32 [N or 1, T]; None: nothing reads them
    segments: jax.Array | None  # int32 [N or 1, T]; None: all see all


class Running(NamedTuple):
    scores: jax.Array  # [Q, N, K, R, k]
    ranks: jax.Array  # int32


def make_plan(
    top_k: int,
    T: int,
    S: int,
    lanes: int,
    group: int,
    sorts: bool,
    mask_fn: MaskFn | None,
    block_queries: int | None,
    block_keys: int | None,
) -> Plan:
    """The plan of a search; lanes is the number of batches times key heads."""
    is_cpu = current_target().platform == "cpu"
    tile = _TILE_CPU if is_cpu else _TILE
    side_by_side = 1 if is_cpu else lanes
    if block_queries is None:
        block_queries = max(tile.rows // (side_by_side * group), _MIN_ROWS // group, 1)
    block_queries = min(block_queries, T)
    if block_keys is None:
        block_keys = tile.scores // (side_by_side * group * block_queries)
        if _reaches(mask_fn) is not None and 2 * T >= S:
            block_keys = min(block_keys, -(-S // _BAND_BLOCKS), _BAND_KEYS)
        block_keys = min(max(block_keys, _MIN_KEYS), tile.keys)
    by_lane = lanes > side_by_side
    return Plan(top_k, group, block_queries, min(block_keys, S), by_lane, sorts, mask_fn)


def product_dtype(queries: jnp.dtype, keys: jnp.dtype) -> jnp.dtype:
    """Of the products' operands: the wider of the two; int8 and fp8 are exact in any of queries."""
    return jnp.dtype(queries) if keys.itemsize == 1 else jnp.promote_types(queries, keys)


def search(plan: Plan, queries: Queries, keys: Keys) -> tuple[jax.Array, jax.Array]:
    """Scores and slots of the best keys of every query row: [N, K, R, k]."""
    N, K, R, _ = queries.rows.shape
    order = None
    if plan.sorts:
        assert keys.positions is not None
        order = order_keys(keys.positions, keys.segments)

    def one_lane(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        lane = Lane(i // K, i % K, K)
        rows = queries.rows[lane.batch, lane.head][None, None]
        tokens = (x if x is None else x[lane.row_of(x)][None] for x in queries[1:])
        scores, ranks = _search(plan, Queries(rows, *tokens), keys, order, lane)
        return scores[0, 0], ranks[0, 0]

    if plan.by_lane:
        scores, ranks = lax.map(one_lane, jnp.arange(N * K))
        scores, ranks = (x.reshape(N, K, R, plan.top_k) for x in (scores, ranks))
    else:
        scores, ranks = _search(plan, queries, keys, order, None)
    # No score but that of a key that is seen is above -inf.
    return scores, jnp.where(scores == -jnp.inf, -1, slots_of(order, ranks))


def _search(
    plan: Plan, queries: Queries, keys: Keys, order: Order | None, lane: Lane | None
) -> tuple[jax.Array, jax.Array]:
    """Scores and ranks, of the keys of one lane if it is given."""
    N, K, R, D = queries.rows.shape
    operands = product_dtype(queries.rows.dtype, keys.keys.dtype)
    blocks = _cut_queries(plan, queries._replace(rows=queries.rows.astype(operands)))
    running = _nothing(plan, blocks.rows)

    def absorb(running: Running, start: int | jax.Array, length: int) -> Running:
        block = cut(keys, order, start, length, lane)
        keys_NCKD = block.keys.astype(operands).reshape(-1, length, K, D)
        block = block._replace(keys=jnp.broadcast_to(keys_NCKD, (N, length, K, D)))

        def one(part: tuple[Queries, Running]) -> Running:
            queries, running = part

            def merged() -> Running:
                return _merge(plan, running, _scores(plan, queries, block), start)

            if queries.segments is None or block.segments is None:
                return merged()
            return lax.cond(_meet(plan, queries, block), merged, lambda: running)

        return lax.map(one, (blocks, running))

    def step(i: jax.Array, running: Running) -> Running:
        return absorb(running, i * plan.block_keys, plan.block_keys)

    whole, rest = divmod(keys.keys.shape[1], plan.block_keys)
    running = lax.fori_loop(0, whole, step, running)
    if rest:
        running = absorb(running, whole * plan.block_keys, rest)
    scores, ranks = running
    return _join(scores, R), _join(ranks, R)


def _nothing(plan: Plan, rows_QNKRD: jax.Array) -> Running:
    shape = (*rows_QNKRD.shape[:-1], plan.top_k)
    scores = jnp.full(shape, -jnp.inf, jnp.promote_types(rows_QNKRD.dtype, jnp.float32))
    ranks = jnp.full(shape, -1, jnp.int32)
    return Running(vary_as(scores, rows_QNKRD), vary_as(ranks, rows_QNKRD))


def _scores(plan: Plan, queries: Queries, block: Block) -> jax.Array:
    """[N, K, R, C], -inf where the query does not see the key."""
    s_NKRC = _products(queries.rows, block.keys)
    if block.scales is not None:
        s_NKRC = s_NKRC * block.scales
    seen_NTC = _visible(plan, queries, block)
    if seen_NTC is not None:
        N, K, R, C = s_NKRC.shape
        s_NKTGC = s_NKRC.reshape(N, K, R // plan.group, plan.group, C)
        s_NKRC = jnp.where(seen_NTC[:, None, :, None], s_NKTGC, -jnp.inf).reshape(N, K, R, C)
    # One tile of scores for all that follows: no entry is compared with a rounding of itself, and
    # XLA on CPU fuses the groups' maxima well over an array that exists.
    return lax.optimization_barrier(s_NKRC)


def _products(q_NKRD: jax.Array, keys_NCKD: jax.Array) -> jax.Array:
    """[N, K, R, C] in float32."""
    dtype = q_NKRD.dtype
    product = functools.partial(
        jnp.einsum,
        precision=lax.Precision.HIGHEST if dtype.itemsize >= 4 else lax.Precision.DEFAULT,
        preferred_element_type=jnp.promote_types(dtype, jnp.float32),
    )
    if q_NKRD.shape[:2] == (1, 1):
        # As matrices: XLA on CPU would copy the keys, transposed, for axes of length one.
        return product("rd,cd->rc", q_NKRD[0, 0], keys_NCKD[0, :, 0])[None, None]
    return product("nkrd,nckd->nkrc", q_NKRD, keys_NCKD)


def _visible(plan: Plan, queries: Queries, block: Block) -> jax.Array | None:
    """bool [N or 1, T, C]; None where every query sees every key."""
    seen = None
    if queries.segments is not None and block.segments is not None:
        q_seg, kv_seg = queries.segments[:, :, None], block.segments[:, None]
        seen = (q_seg == kv_seg) & (kv_seg >= 0)
        if plan.mask_fn is not None:
            assert queries.positions is not None and block.positions is not None
            q_pos, kv_pos = queries.positions[:, :, None], block.positions[:, None]
            seen &= jnp.asarray(plan.mask_fn(q_pos, kv_pos, q_seg, kv_seg), bool)
    return seen


def _meet(plan: Plan, queries: Queries, block: Block) -> jax.Array:
    """Whether some row of the batch may have a query that sees a key, by segments and by the
    positions that the mask says it reaches: bool."""
    assert queries.segments is not None and block.segments is not None
    q_is, kv_is = queries.segments >= 0, block.segments >= 0
    q_least, q_most = _range(queries.segments, q_is)
    kv_least, kv_most = _range(block.segments, kv_is)
    may = (q_least <= kv_most) & (kv_least <= q_most)
    reaches = _reaches(plan.mask_fn)
    if reaches is not None:
        assert queries.positions is not None and block.positions is not None
        may &= reaches(*_range(queries.positions, q_is), *_range(block.positions, kv_is))
    return jnp.any(may)


def _range(x_NT: jax.Array, counts_NT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Least and greatest of those that count, [N]: the wrong way round where none does."""
    limits = jnp.iinfo(jnp.int32)
    least = jnp.min(jnp.where(counts_NT, x_NT, limits.max), axis=-1)
    return least, jnp.max(jnp.where(counts_NT, x_NT, limits.min), axis=-1)


def _reaches(mask_fn: MaskFn | None) -> Callable[..., jax.Array] | None:
    return getattr(mask_fn, "reaches", None)


def _merge(plan: Plan, running: Running, s_NKRC: jax.Array, start: int | jax.Array) -> Running:
    """The running list of a block of queries after one more block of keys, whose ranks start at
    start."""
    values, columns = candidates(s_NKRC, plan.top_k)
    values = jnp.concatenate([running.scores, values], axis=-1)
    ranks = jnp.concatenate([running.ranks, columns + start], axis=-1)
    scores, at = lax.top_k(values, plan.top_k)
    return Running(scores, jnp.take_along_axis(ranks, at, axis=-1, mode="promise_in_bounds"))


def _cut_queries(plan: Plan, queries: Queries) -> Queries:
    """Each array with a leading axis of Q blocks; the last is filled up with queries that see
    nothing, or whose picks are cut off."""
    block = plan.block_queries

    def blocks(x: jax.Array, axis: int, length: int, fill: int) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, -x.shape[axis] % length)
        x = jnp.pad(x, widths, constant_values=fill)
        x = x.reshape(*x.shape[:axis], -1, length, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    return Queries(
        blocks(queries.rows, 2, block * plan.group, 0),
        None if queries.positions is None else blocks(queries.positions, 1, block, 0),
        None if queries.segments is None else blocks(queries.segments, 1, block, -1),
    )


def _join(x_QNKRk: jax.Array, R: int) -> jax.Array:
    """[N, K, R, k] of all blocks, without what filled up the last."""
    Q, N, K, rows, k = x_QNKRk.shape
    return jnp.moveaxis(x_QNKRk, 0, 2).reshape(N, K, Q * rows, k)[:, :, :R]
