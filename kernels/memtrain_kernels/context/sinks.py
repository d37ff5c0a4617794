"""Sink tokens on a ring that does not go all the way round: gathered once, from every stretch.

A window lets a ring stop after a few hops, but the first tokens of a document stay visible from far
away. Of all documents of a stretch only the last goes on beyond it, so each stretch gives its last
document's sinks, `sink_tokens` of them at most.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memtrain_kernels.context.layout import Layout
from memtrain_kernels.context.members import Members
from memtrain_kernels.context.schedule import Schedule


class Sinks(NamedTuple):
    """Keys that a device did not meet on the ring: k [B, N, K, D], v [B, N, K, E], int32 [B, N]."""

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    segments: jax.Array


def gather_sinks(
    k_BSKD: jax.Array,
    v_BSKE: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    sink_tokens: int,
    layout: Layout,
    members: Members,
    schedule: Schedule,
) -> Sinks:
    """The sinks of all members' stretches; those of stretches met on the ring are hidden.

    positions, segments: int32 [B, S]. Differentiable in k and v.
    """
    B, S = positions.shape
    pieces = layout.pieces
    per_piece = min(sink_tokens, S // pieces)
    parts = (B * pieces, S // pieces)
    pos, seg = positions.reshape(parts), segments.reshape(parts)
    last = jnp.max(seg, axis=1, keepdims=True)
    begin = jnp.argmax(seg == last, axis=1)
    index = jnp.minimum(begin[:, None] + jnp.arange(per_piece), parts[1] - 1)
    at = begin[:, None] + jnp.arange(per_piece) < parts[1]
    pos, seg = (jnp.take_along_axis(x, index, axis=1) for x in (pos, seg))
    shown = at & (seg == last) & (pos < sink_tokens)
    seg = jnp.where(shown, seg, -1)

    def take(x: jax.Array) -> jax.Array:
        x = x.reshape(*parts, *x.shape[2:])
        x = jnp.take_along_axis(x, index[:, :, None, None], axis=1)
        return x.reshape(B, pieces * per_piece, *x.shape[2:])

    k, v = take(k_BSKD), take(v_BSKE)
    pos, seg = (x.reshape(B, pieces * per_piece) for x in (pos, seg))
    index = index.reshape(B, pieces * per_piece)
    # [ranks, B, ...]
    k, v, pos, seg, index = (members.gather(x) for x in (k, v, pos, seg, index))
    rank = members.rank()
    met = jnp.asarray(schedule.visited(pieces))[rank]  # [ranks, pieces]
    met = jnp.repeat(met, per_piece, axis=1)[:, None]
    if schedule.tail is not None:
        # Of others' stretches only the end was met.
        own = jnp.arange(members.ranks)[:, None, None] == rank
        met = met & (own | (index >= parts[1] - schedule.tail))
    seg = jnp.where(met, -1, seg)

    def flat(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1)
        return lax.reshape(x, (B, x.shape[1] * x.shape[2], *x.shape[3:]))

    return Sinks(flat(k), flat(v), flat(pos), flat(seg))
