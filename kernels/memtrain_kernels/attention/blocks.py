"""Cutting the score matrix into tiles, and telling which tiles the mask empties.

Two sources of knowledge. By index, when the program is compiled: the positions are the indices, or
the caller promised that tokens stand in order. By data, when it runs: the least and greatest
position and segment of every block, O(S / block) numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memtrain_kernels.attention.spec import AttentionSpec


# Measured on CPU, where this backend is the one in use: tiles small enough to stay in the cache.
_BLOCK = 128
_BLOCK_SHORT = 64
_BLOCK_LONG = 256
_BLOCK_VERY_LONG = 512
# Slower than smaller ones by a tenth each, but XLA on CPU keeps 5 KB for every batched matrix
# product of more than 256 rows until the program ends, and such a call takes minutes: a ring over a
# million tokens would keep 25 GiB in tiles of 1,024.
_BLOCK_HUGE = 1024
_BLOCK_HUGEST = 2048
_LONG = 1024
_VERY_LONG = 4096
_HUGE = 65_536
_HUGEST = 131_072
# One tile of this many scores a head and row is cheaper than several: decoding, prefill chunks.
_ONE_TILE = 128 * 2048
# Tiles beyond this many are looped over: the program's size must not grow with the sequence.
_MAX_UNROLLED = 64


@dataclass(frozen=True)
class Plan:
    """How one call is cut. T queries and S keys, in blocks of block_q and block_kv tokens.

    by_default: positions are 0..T-1 and 0..S-1. by_index: those, or spec.ordered; either lets
    index comparisons rule tiles out. data: positions or segments are given as arrays.
    """

    T: int
    S: int
    block_q: int
    block_kv: int
    by_default: bool
    by_index: bool
    data: bool
    spec: AttentionSpec

    @property
    def num_q(self) -> int:
        return -(-self.T // self.block_q)

    @property
    def num_kv(self) -> int:
        return -(-self.S // self.block_kv)

    def q_bounds(self, i: int) -> tuple[int, int]:
        return i * self.block_q, min((i + 1) * self.block_q, self.T)

    def kv_bounds(self, j: int) -> tuple[int, int]:
        return j * self.block_kv, min((j + 1) * self.block_kv, self.S)

    def kv_tiles(self, i: int) -> list[int]:
        """The kv blocks in which query block i may see something, as far as indices tell."""
        return [
            j
            for j in range(self.num_kv)
            if self.possible_by_index(*self.q_bounds(i), *self.kv_bounds(j))
        ]

    def possible_by_index(self, lo, hi, a, b):
        """Whether indices leave a tile of queries [lo, hi) and keys [a, b) any visible pair.

        Python ints or traced ones.
        """
        seen = (a >= 0) & True
        if not self.by_index:
            return seen
        spec = self.spec
        if spec.causal:
            seen = seen & (a < hi)
        if spec.window_left is not None:
            left = lo - (b - 1) < spec.window_left
            if spec.sink_tokens:
                # In order, a document may start anywhere; by default it starts at 0.
                left = left | (a < (spec.sink_tokens if self.by_default else self.S))
            seen = seen & left
        if spec.window_right is not None:
            seen = seen & (a - (hi - 1) < spec.window_right)
        return (seen | (a < spec.prefix)) if spec.prefix else seen

    @property
    def unrolled(self) -> bool:
        """Whether the tiles are written out: indices tell them apart, and they are few."""
        if self.num_q * self.num_kv == 1:
            return True
        sinks_anywhere = (
            self.spec.window_left is not None and self.spec.sink_tokens and not self.by_default
        )
        if not self.by_index or sinks_anywhere or self.num_q > _MAX_UNROLLED:
            return False
        return sum(len(self.kv_tiles(i)) for i in range(self.num_q)) <= _MAX_UNROLLED


def make_plan(
    T: int, S: int, group: int, by_default: bool, data: bool, spec: AttentionSpec
) -> Plan:
    """Choose the blocks of one call; `group` query heads share a key head and its rows."""
    # A prefix lets a query see ahead, and a document may start anywhere: only by default does the
    # index tell where.
    by_index = by_default or (spec.ordered and not spec.prefix)

    def plan(block_q: int, block_kv: int) -> Plan:
        block_q, block_kv = spec.block_q or block_q, spec.block_kv or block_kv
        return Plan(T, S, min(block_q, T), min(block_kv, S), by_default, by_index, data, spec)

    if T == 1 or (T <= _BLOCK and T * S <= _ONE_TILE):
        return plan(T, S)
    if max(T, S) >= _HUGE and spec.window is None:
        block = _BLOCK_HUGEST if max(T, S) >= _HUGEST else _BLOCK_HUGE
    elif max(T, S) >= _VERY_LONG and by_default and not data and spec.window is None:
        block = _BLOCK_VERY_LONG  # documents and windows leave tiles half empty: they want less
    elif max(T, S) > _LONG:
        block = _BLOCK_LONG
    elif by_index and spec.window_left is not None and spec.window_left <= _BLOCK_SHORT:
        # A block of queries reads its window rounded up to blocks: a short one wants short blocks.
        block = _BLOCK_SHORT
    else:
        block = _BLOCK
    # Rows of a tile are queries times group; fewer queries keep its size.
    return plan(max(16, block // group), block)


class Summary(NamedTuple):
    """Of each block's visible tokens the least and greatest position and segment, and whether all
    its tokens are visible ones: int32 [B or 1, n] each, the last bool."""

    pos_min: jax.Array
    pos_max: jax.Array
    seg_min: jax.Array
    seg_max: jax.Array
    whole: jax.Array


_INT_MAX = np.iinfo(np.int32).max
_FAR = _INT_MAX // 2


def summarise(pos: jax.Array, seg: jax.Array, block: int) -> Summary:
    """Summary of [B or 1, n * block] positions and segments; an empty block has seg_max < 0."""
    batch = max(pos.shape[0], seg.shape[0])
    shape = (batch, pos.shape[1] // block, block)
    pos = jnp.broadcast_to(pos, (batch, pos.shape[1])).reshape(shape)
    seg = jnp.broadcast_to(seg, (batch, seg.shape[1])).reshape(shape)
    shown = seg >= 0
    return Summary(
        jnp.min(jnp.where(shown, pos, _INT_MAX), axis=-1),
        jnp.max(jnp.where(shown, pos, -_INT_MAX), axis=-1),
        jnp.min(jnp.where(shown, seg, _INT_MAX), axis=-1),
        jnp.max(jnp.where(shown, seg, -1), axis=-1),
        jnp.all(shown, axis=-1),
    )


def live_tiles(spec: AttentionSpec, q: Summary, kv: Summary) -> jax.Array:
    """Whether tiles may hold a visible pair: bool [B or 1, ...]. Never False for one that does.

    The summaries broadcast after their leading batch axis. Also on scalars, inside a kernel.
    """
    live = (q.seg_min <= kv.seg_max) & (kv.seg_min <= q.seg_max)
    near = jnp.bool_(True)
    if spec.causal:
        near &= kv.pos_min <= q.pos_max
    if spec.window_left is not None:
        left = ~_further(q.pos_min, kv.pos_max, spec.window_left)
        if spec.sink_tokens:
            left |= kv.pos_min < spec.sink_tokens
        near &= left
    if spec.window_right is not None:
        near &= ~_further(kv.pos_min, q.pos_max, spec.window_right)
    if spec.prefix:
        near |= kv.pos_min < spec.prefix
    return live & near


def full_tiles(spec: AttentionSpec, q: Summary, kv: Summary) -> jax.Array:
    """Whether every query of a tile sees every key of it, so that no mask is needed: bool, as
    `live_tiles`. Never True for a tile with a hidden pair."""
    one_segment = (q.seg_min == q.seg_max) & (kv.seg_min == kv.seg_max) & (q.seg_min == kv.seg_min)
    full = one_segment & q.whole & kv.whole & (spec.mask_fn is None)
    near = jnp.bool_(True)
    if spec.causal:
        near &= kv.pos_max <= q.pos_min
    if spec.window_left is not None:
        left = _nearer(q.pos_max, kv.pos_min, spec.window_left)
        if spec.sink_tokens:
            left |= kv.pos_max < spec.sink_tokens
        near &= left
    if spec.window_right is not None:
        near &= _nearer(kv.pos_max, q.pos_min, spec.window_right)
    if spec.prefix:
        near |= kv.pos_max < spec.prefix
    return full & near


def _further(high: jax.Array, low: jax.Array, distance: int) -> jax.Array:
    """high - low >= distance; False where the difference might wrap."""
    return (high - low >= distance) & (jnp.abs(high) <= _FAR) & (jnp.abs(low) <= _FAR)


def _nearer(high: jax.Array, low: jax.Array, distance: int) -> jax.Array:
    """high - low < distance; False where the difference might wrap."""
    return (high - low < distance) & (high <= _FAR) & (low >= -_FAR)


def pad_tokens(x: jax.Array, axis: int, block: int, fill: int = 0) -> jax.Array:
    """x with its token axis lengthened to a multiple of block."""
    missing = math.ceil(x.shape[axis] / block) * block - x.shape[axis]
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths, constant_values=fill)
