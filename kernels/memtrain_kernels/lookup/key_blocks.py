"""The keys of one lookup, cut into blocks in the order in which ties are settled.

Axes: N batch of the keys' tokens, S keys, K key heads, R = tokens * G query rows of a key head (G
query heads a key head, token-major), C keys of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memtrain_kernels.varying import vary_as


class Keys(NamedTuple):
    """What is searched. Each batch axis may be 1 and then serves all rows of N."""

    keys: jax.Array  # [N, S, K * D]
    scales: jax.Array | None  # [N, S, K] a key, or [K] a head
    positions: jax.Array | None  # int32 [N, S]; None: nothing reads them
    segments: jax.Array | None  # int32 [N, S]; None: all see all


class Order(NamedTuple):
    """The keys by (segment, position), then slot: all that a query sees, it sees by position.

    Blocks that lie together as they are given, which is all of them or all but one where the keys
    ascend or are a ring that goes on, are read in place; the rest is gathered.

    A set of keys that is given in another order is thereby searched in the same one, block by
    block: its scores and its ties come out the same, to the bit.
    """

    slots: jax.Array  # int32 [N or 1, S]


class Lane(NamedTuple):
    """One batch and key head: a matrix product of its own."""

    batch: jax.Array
    head: jax.Array
    heads: int  # of the keys

    def row_of(self, x: jax.Array) -> jax.Array:
        return jnp.zeros_like(self.batch) if x.shape[0] == 1 else self.batch


class Block(NamedTuple):
    """Some keys in order: as Keys, but [N, C, ...]; N = K = 1 in a lane."""

    keys: jax.Array
    scales: jax.Array | None  # [N, K, 1, C] or [1, K, 1, 1]
    positions: jax.Array | None
    segments: jax.Array | None


def order_keys(positions: jax.Array, segments: jax.Array | None) -> Order:
    """The order of keys with these positions, int32 [N or 1, S]."""
    if segments is None:
        segments = jnp.zeros((1, 1), jnp.int32)
    segments, positions = jnp.broadcast_arrays(segments, positions)
    S = positions.shape[1]
    slots = vary_as(lax.broadcasted_iota(jnp.int32, positions.shape, 1), positions)
    s0, p0 = segments, positions
    s1, p1 = (jnp.roll(x, -1, axis=1) for x in (s0, p0))
    falls = (s0 > s1) | ((s0 == s1) & (p0 > p1))
    # From the last key to the first there is a fall, unless a ring goes on there, without a tie.
    goes_on = (s0 < s1) | ((s0 == s1) & (p0 < p1))
    falls = jnp.where(slots == S - 1, ~goes_on, falls)
    # Keys in order fall at their end; a ring that is written on and on, where its oldest key is.
    is_ring = jnp.all(jnp.sum(falls, axis=1) <= 1)

    def turned() -> jax.Array:
        first = jnp.argmax(falls, axis=1).astype(jnp.int32)[:, None] + 1
        return (slots + first) % S

    def sort() -> jax.Array:
        return lax.sort((segments, positions, slots), num_keys=2, is_stable=True)[2]

    return Order(lax.cond(is_ring, turned, sort))


def cut(
    keys: Keys, order: Order | None, start: int | jax.Array, length: int, lane: Lane | None
) -> Block:
    """The keys of ranks start .. start + length - 1, of all batches and heads or of one lane."""

    def given(x: jax.Array, start: int | jax.Array = start) -> jax.Array:
        if lane is not None:
            starts, sizes = [lane.row_of(x), start], [1, length]
            if x.ndim == 3:
                width = x.shape[2] // lane.heads
                starts, sizes = [*starts, lane.head * width], [*sizes, width]
            return lax.dynamic_slice(x, starts, sizes)
        if x.shape[0] == 1:  # a TPU would lay all of x out anew for an axis of one
            return lax.dynamic_slice_in_dim(x[0], start, length, axis=0)[None]
        return lax.dynamic_slice_in_dim(x, start, length, axis=1)

    def gathered(x: jax.Array, slots_NC: jax.Array) -> jax.Array:
        if lane is not None:
            if x.ndim == 2:
                return x[lane.row_of(x), slots_NC]
            return x.reshape(*x.shape[:2], lane.heads, -1)[lane.row_of(x), slots_NC, lane.head]
        if slots_NC.shape[0] == 1:
            return jnp.take(x, slots_NC[0], axis=1, mode="clip")
        if x.shape[0] == 1:
            return jnp.take(x[0], slots_NC, axis=0, mode="clip")
        return jax.vmap(lambda row, slots_C: jnp.take(row, slots_C, axis=0, mode="clip"))(
            x, slots_NC
        )

    def in_order(x: jax.Array) -> jax.Array:
        if order is None:
            return given(x)
        slots_NC = given(order.slots)
        first = slots_NC[0, 0]
        together = jnp.all(slots_NC == first + jnp.arange(length, dtype=jnp.int32))
        as_gathered = jax.eval_shape(gathered, x, slots_NC).shape
        return lax.cond(
            together,
            lambda: jnp.broadcast_to(given(x, first), as_gathered),
            lambda: gathered(x, slots_NC),
        )

    scales = keys.scales
    if scales is not None and scales.ndim == 1:
        scales = (scales if lane is None else scales[lane.head, None])[None, :, None, None]
    elif scales is not None:
        scales = in_order(scales).transpose(0, 2, 1)[:, :, None]
    return Block(
        in_order(keys.keys),
        scales,
        None if keys.positions is None else in_order(keys.positions),
        None if keys.segments is None else in_order(keys.segments),
    )


def slots_of(order: Order | None, ranks_NKRk: jax.Array) -> jax.Array:
    """The slots of keys of these ranks; ranks out of range may give any."""
    if order is None:
        return ranks_NKRk
    flat = ranks_NKRk.reshape(ranks_NKRk.shape[0], -1)
    slots = jnp.broadcast_to(order.slots, (flat.shape[0], order.slots.shape[1]))
    return jnp.take_along_axis(slots, flat, axis=1, mode="clip").reshape(ranks_NKRk.shape)
