"""The mask as a function of positions and segments: the one definition all backends share."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from memtrain_kernels.attention.spec import AttentionSpec


def visible(
    spec: AttentionSpec,
    q_pos: jax.Array,
    kv_pos: jax.Array,
    q_seg: jax.Array,
    kv_seg: jax.Array,
) -> jax.Array:
    """Whether each query sees each key: bool in the broadcast shape of the four int32 arrays."""
    seen = (q_seg == kv_seg) & (kv_seg >= 0)
    near = None
    for rule in _rules(spec, q_pos, kv_pos):
        near = rule if near is None else near & rule
    if near is not None:
        seen &= (near | (kv_pos < spec.prefix)) if spec.prefix else near
    if spec.mask_fn is not None:
        seen &= jnp.asarray(spec.mask_fn(q_pos, kv_pos, q_seg, kv_seg), bool)
    return seen


def _rules(spec: AttentionSpec, q_pos: jax.Array, kv_pos: jax.Array) -> Iterator[jax.Array]:
    """What positions must fulfil, all of it; a prefix is exempt."""
    if spec.causal:
        yield kv_pos <= q_pos
    if spec.window_left is not None:
        left = q_pos - kv_pos < spec.window_left
        yield (left | (kv_pos < spec.sink_tokens)) if spec.sink_tokens else left
    if spec.window_right is not None:
        yield kv_pos - q_pos < spec.window_right


def fill_defaults(
    T: int,
    S: int,
    q_pos: jax.Array | None,
    kv_pos: jax.Array | None,
    q_seg: jax.Array | None,
    kv_seg: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Positions 0..T-1, 0..S-1 and segment 0 where they were left out: int32 [B or 1, T or S]."""
    return (
        jnp.arange(T, dtype=jnp.int32)[None] if q_pos is None else q_pos,
        jnp.arange(S, dtype=jnp.int32)[None] if kv_pos is None else kv_pos,
        jnp.zeros((1, T), jnp.int32) if q_seg is None else q_seg,
        jnp.zeros((1, S), jnp.int32) if kv_seg is None else kv_seg,
    )
