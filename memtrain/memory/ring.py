"""Slots of a ring that keeps the newest tokens of each row, and writing tokens to slots."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from memtrain.memory.protocol import Context, running_count


def ring_slots(
    joins: Bool[Array, "B T"], length: Int[Array, "B"], ring: int, wanted: int, ctx: Context
) -> tuple[Int[Array, "B T"], Int[Array, "B"], Bool[Array, "B"]]:
    """Where the tokens that join a ring go: (slot, length after them, overflow).

    Slot = arrival number modulo the ring; `ring` itself, which is past the end, for a token that is
    not written. length: tokens that have joined. wanted: tokens that the ring should hold; it is
    shorter only where the state's capacity is, and then nothing may wrap.
    """
    rank = running_count(joins, ctx) - 1
    count = jnp.max(rank, axis=1, keepdims=True) + 1
    arrival = length[:, None] + rank
    short = ring < wanted
    # Of tokens that share a slot only the newest is written: a scatter has no order.
    kept = joins & ((arrival < ring) if short else (rank >= count - ring))
    after = length + count[:, 0]
    overflow = (after > ring) if short else jnp.zeros(after.shape, bool)
    return jnp.where(kept, arrival % ring, ring), after, overflow


def write_tokens(
    state: dict[str, Any], prefix: str, slot: Int[Array, "B T"], tokens: dict[str, Any]
) -> dict[str, Any]:
    """Scatters tokens to their slots in each row; a slot past the end drops its token.

    tokens: arrays [B, T, ...] by the names that they have in the state behind the prefix.
    """
    out = dict(state)
    for name, leaf in tokens.items():
        old = state[prefix + name]
        out[prefix + name] = jax.vmap(lambda o, s, n: o.at[s].set(n, mode="drop"))(
            old, slot, leaf.astype(old.dtype)
        )
    return out


def in_order(
    state: dict[str, Any], prefix: str, names: tuple[str, ...], live: Bool[Array, "B S"]
) -> dict[str, Any]:
    """Live slots by position, the rest zero and last: what `live_state` shows of a ring."""
    position = state[prefix + "position"]
    order = jnp.argsort(jnp.where(live, position, 2**31 - 1), axis=1)
    out = {}
    for name in names:
        leaf = state[prefix + name]
        trailing = (1,) * (leaf.ndim - 2)
        leaf = jnp.where(live.reshape(live.shape + trailing), leaf, jnp.zeros((), leaf.dtype))
        out[prefix + name] = jnp.take_along_axis(
            leaf, order.reshape(order.shape + trailing), axis=1
        )
    return out
