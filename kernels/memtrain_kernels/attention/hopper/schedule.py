"""Which tiles of the score matrix a block visits, decided from block summaries: O(tokens / block).

The kernels and their twins run this very code: `live` and `full` on scalars that a kernel reads, on
whole arrays in XLA. A tile is one block of queries against one block of keys; it is skipped (no
visible pair can be in it), partial (the mask is applied) or full (every pair is visible).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memtrain_kernels.attention.spec import AttentionSpec


_INT_MAX = np.iinfo(np.int32).max


class Summary(NamedTuple):
    """Of a block's visible tokens (segment >= 0) the least and greatest position and segment, and
    whether all tokens are visible (1 or 0): int32 arrays or scalars of one shape."""

    pos_min: jax.Array
    pos_max: jax.Array
    seg_min: jax.Array
    seg_max: jax.Array
    whole: jax.Array


class Walk(NamedTuple):
    """The tiles that a block visits, in order: the live ones of [early, early_end) that are not in
    [near, near_end), then the live ones of [near, near_end); count in all. int32.

    Two ranges, because sink tokens and prefixes are far from the window: what lies between them is
    never looked at.
    """

    early: jax.Array
    early_end: jax.Array
    near: jax.Array
    near_end: jax.Array
    count: jax.Array


def summarise(pos: jax.Array, seg: jax.Array, block: int) -> Summary:
    """Summary [B, n] of positions and segments [B, n * block]."""
    shape = (pos.shape[0], pos.shape[1] // block, block)
    pos, seg = pos.reshape(shape), seg.reshape(shape)
    shown = seg >= 0
    return Summary(
        jnp.min(jnp.where(shown, pos, _INT_MAX), axis=-1),
        jnp.max(jnp.where(shown, pos, -_INT_MAX), axis=-1),
        jnp.min(jnp.where(shown, seg, _INT_MAX), axis=-1),
        jnp.max(jnp.where(shown, seg, -1), axis=-1),
        jnp.all(shown, axis=-1).astype(jnp.int32),
    )


def live(spec: AttentionSpec, q: Summary, kv: Summary) -> jax.Array:
    """Whether a tile may hold a visible pair; never False for one that does."""
    seen = (q.seg_min <= kv.seg_max) & (kv.seg_min <= q.seg_max)
    rules = []
    if spec.causal:
        rules.append(kv.pos_min <= q.pos_max)
    if spec.window_left is not None:
        left = q.pos_min - kv.pos_max < spec.window_left
        rules.append(left | (kv.pos_min < spec.sink_tokens) if spec.sink_tokens else left)
    if spec.window_right is not None:
        rules.append(kv.pos_min - q.pos_max < spec.window_right)
    return _all(seen, rules, kv.pos_min < spec.prefix if spec.prefix else None)


def full(spec: AttentionSpec, q: Summary, kv: Summary) -> jax.Array:
    """Whether every pair of a tile is visible; never True where one is not."""
    seen = (q.whole + kv.whole == 2) & (q.seg_min == q.seg_max)
    seen = seen & (kv.seg_min == kv.seg_max) & (q.seg_min == kv.seg_min)
    rules = []
    if spec.causal:
        rules.append(kv.pos_max <= q.pos_min)
    if spec.window_left is not None:
        left = q.pos_max - kv.pos_min < spec.window_left
        rules.append(left | (kv.pos_max < spec.sink_tokens) if spec.sink_tokens else left)
    if spec.window_right is not None:
        rules.append(kv.pos_max - q.pos_min < spec.window_right)
    return _all(seen, rules, kv.pos_max < spec.prefix if spec.prefix else None)


def _all(seen: Any, rules: list[Any], exempt: Any) -> Any:
    if not rules:
        return seen
    near = rules[0]
    for rule in rules[1:]:
        near = near & rule
    return seen & (near if exempt is None else near | exempt)


def walks_over_keys(spec: AttentionSpec, q: Summary, kv: Summary) -> Walk:
    """For each block of queries the blocks of keys that it visits: [B, num_q_blocks]."""
    return _walks(spec, _at(q, np.s_[:, :, None]), _at(kv, np.s_[:, None, :]), axis=2)


def walks_over_queries(spec: AttentionSpec, q: Summary, kv: Summary) -> Walk:
    """For each block of keys the blocks of queries that visit it: [B, num_kv_blocks]."""
    return _walks(spec, _at(q, np.s_[:, :, None]), _at(kv, np.s_[:, None, :]), axis=1)


def _at(summary: Summary, index: Any) -> Summary:
    return Summary(*(x[index] for x in summary))


def _walks(spec: AttentionSpec, q: Summary, kv: Summary, axis: int) -> Walk:
    # XLA fuses each comparison into its reduction: no array of tiles is written.
    alive = near = live(spec, q, kv)
    count = jnp.sum(alive.astype(jnp.int32), axis=axis)
    if has_early(spec):
        near = live(dataclasses.replace(spec, sink_tokens=0, prefix=0), q, kv)
    index = lax.broadcasted_iota(jnp.int32, alive.shape, axis)
    start, end = _range(near, index, axis)
    if not has_early(spec):
        return Walk(jnp.zeros_like(start), jnp.zeros_like(end), start, end, count)
    outside = (index < jnp.expand_dims(start, axis)) | (index >= jnp.expand_dims(end, axis))
    return Walk(*_range(alive & outside, index, axis), start, end, count)


def _range(chosen: jax.Array, index: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    end = jnp.max(jnp.where(chosen, index + 1, 0), axis=axis)
    return jnp.minimum(jnp.min(jnp.where(chosen, index, _INT_MAX), axis=axis), end), end


def has_early(spec: AttentionSpec) -> bool:
    """Whether keys outside the window's range of tiles may be visible."""
    return bool(spec.sink_tokens or spec.prefix)


def visit[Carry](
    spec: AttentionSpec,
    walk: Walk,
    is_live: Callable[[jax.Array], jax.Array],
    tile: Callable[[jax.Array, Carry], Carry],
    carry: Carry,
) -> Carry:
    """Run `tile(index, carry)` on the live tiles of one block's walk (scalars), in order."""

    def step(j: jax.Array, carry: Carry, outside_near: bool) -> Carry:
        alive = is_live(j)
        if outside_near:
            alive = alive & ((j < walk.near) | (j >= walk.near_end))
        return lax.cond(alive, tile, lambda j, carry: carry, j, carry)

    if has_early(spec):
        carry = lax.fori_loop(walk.early, walk.early_end, lambda j, c: step(j, c, True), carry)
    return lax.fori_loop(walk.near, walk.near_end, lambda j, c: step(j, c, False), carry)
