"""Inputs of the tests, and one call of the backend with its gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import tile_oracle

from memtrain_kernels.attention import AttentionSpec, tpu


def same_parity(q_pos, kv_pos, q_seg, kv_seg):
    return (q_pos - kv_pos) % 2 == 0


def arrays(B=1, T=300, S=300, H=2, K=1, D=64, E=64, dtype="float32", seed=0):
    """q, k, v and the cotangents of out and lse."""
    rng = np.random.default_rng(seed)
    shapes = (B, T, H, D), (B, S, K, D), (B, S, K, E), (B, T, H, E), (B, T, H)
    q, k, v, d_out, d_lse = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v)), (d_out, d_lse)


def results(inputs, cotangents, tokens, spec: AttentionSpec, interpret):
    """(out, lse), (dq, dk, dv). tokens: positions of q and of kv, then segments, each or None."""

    @jax.jit
    def run(inputs, tokens, cotangents):
        def attend(q, k, v):
            q_pos, kv_pos, q_seg, kv_seg = tokens
            return tpu.attend(q, k, v, q_pos, kv_pos, q_seg, kv_seg, spec, interpret=interpret)

        outputs, pull = jax.vjp(attend, *inputs)
        return outputs, pull(cotangents)

    return run(inputs, tokens, cotangents)


def check(inputs, cotangents, tokens, spec: AttentionSpec, tolerance: float, interpret=True):
    """The backend against float64, results and gradients; returns them."""
    (q, k, v), (B, T) = inputs, inputs[0].shape[:2]
    S = k.shape[1]
    ours = results(inputs, cotangents, tokens, spec, interpret)
    q_pos, kv_pos, q_seg, kv_seg = (
        np.broadcast_to(default if given is None else given, (B, length))
        for given, default, length in zip(
            tokens, (np.arange(T), np.arange(S), 0, 0), (T, S, T, S), strict=True
        )
    )
    expected = tile_oracle.dense(q, k, v, spec, (q_pos, kv_pos), (q_seg, kv_seg), cotangents)
    for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        tile_oracle.close(mine, theirs, tolerance)
    return ours
