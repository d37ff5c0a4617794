"""The gated delta rule in chunks: matrix products within a chunk, a short scan over chunks.

Chunks are made a segment at a time, so that what they need in between is bounded whatever the
length; a segment is computed again in the backward, which begins from the states between segments.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from memtrain_kernels.scan.arguments import Run
from memtrain_kernels.scan.chunks import Chunks, chunks_of


CHUNK = 64
SEGMENT = 4096
"""Tokens."""


def chunked(run: Run, state: Array, *, chunk: int = CHUNK) -> tuple[Array, Array]:
    """Outputs [B, T, H, V] and the state after, [B, H, K, V]."""
    B, T, H, V = run.value.shape
    # A short run is one chunk, whose size divides into blocks.
    size = next(c for c in (16, 32, chunk) if c >= min(T, chunk))
    segment = -(-T // size) * size if T <= SEGMENT else SEGMENT
    run = _padded(run, -T % segment)
    # Within the state, value heads stand behind their key head.
    G = H if run.by_channel else run.query.shape[2]
    S = state.reshape(B, G, H // G, *state.shape[2:])

    def body(S: Array, part: Run) -> tuple[Array, Array]:
        chunks = chunks_of(part, size)
        S, out = _over_chunks(chunks, S)
        return S, jnp.moveaxis(out, (0, 4), (1, 2)).reshape(B, segment, H, V)

    if segment >= T:
        S, out = body(S, run)
    else:
        parts = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(B, -1, segment, *x.shape[2:]), 1, 0), run
        )
        S, out = lax.scan(jax.checkpoint(body), S, parts)
        out = jnp.moveaxis(out, 0, 1).reshape(B, -1, H, V)
    return out[:, :T], S.reshape(state.shape)


def _over_chunks(chunks: Chunks, S: Array) -> tuple[Array, Array]:
    """The state after all chunks, and the outputs [n, b, g, r, i, v]."""

    def step(S: Array, chunk: Chunks) -> tuple[Array, tuple[Array, Array]]:
        R = chunk.written(S)
        return chunk.after(S, R), (S, R)

    S, (entering, R) = lax.scan(step, S, chunks)
    return S, chunks.outputs(entering, R)


def _padded(run: Run, more: int) -> Run:
    """With tokens at the end that change nothing."""
    if not more:
        return run
    wider: dict[str, Any] = {
        field.name: jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2))
        for field in dataclasses.fields(run)
        if (x := getattr(run, field.name)) is not None
    }
    return dataclasses.replace(run, **wider)
