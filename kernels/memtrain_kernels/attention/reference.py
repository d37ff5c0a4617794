"""The dense backend: every score at once, plain jnp, differentiable to any order."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from memtrain_kernels.attention.capabilities import Capabilities
from memtrain_kernels.attention.masks import fill_defaults, visible
from memtrain_kernels.attention.spec import AttentionSpec


CAPABILITIES = Capabilities("reference", verified_on=("*",))
"""Serves everything, everywhere: plain jnp, held to a float64 oracle by the tests."""


def attend(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKE: jax.Array,
    q_pos: jax.Array | None,
    kv_pos: jax.Array | None,
    q_seg: jax.Array | None,
    kv_seg: jax.Array | None,
    spec: AttentionSpec,
) -> tuple[jax.Array, jax.Array]:
    """Attention with the whole score matrix in memory.

    B batch, T queries, S keys, H query heads, K key heads, G = H / K, D key dim, E value dim;
    positions and segments are [B or 1, T or S], None for
    the defaults. Returns o [B, T, H, E] and lse [B, T, H], both in
    the accumulation dtype (float32, or wider inputs' own).
    """
    B, T, H, D = q_BTHD.shape
    K, E = v_BSKE.shape[2:]
    acc_dtype = jnp.promote_types(q_BTHD.dtype, jnp.float32)
    q_BTKGD = q_BTHD.reshape(B, T, K, H // K, D)
    s_BKGTS = jnp.einsum("btkgd,bskd->bkgts", q_BTKGD, k_BSKD, preferred_element_type=acc_dtype)
    s_BKGTS = s_BKGTS * spec.scale_for(D)
    if spec.soft_cap is not None:
        s_BKGTS = spec.soft_cap * jnp.tanh(s_BKGTS / spec.soft_cap)
    S = k_BSKD.shape[1]
    q_pos, kv_pos, q_seg, kv_seg = fill_defaults(T, S, q_pos, kv_pos, q_seg, kv_seg)
    seen_BTS = visible(
        spec, q_pos[:, :, None], kv_pos[:, None, :], q_seg[:, :, None], kv_seg[:, None, :]
    )
    seen = seen_BTS[:, None, None]
    # Masked scores are replaced before exp, so that no gradient meets an infinity.
    m_BKGT1 = lax.stop_gradient(jnp.max(s_BKGTS, axis=-1, keepdims=True, where=seen, initial=-1e30))
    p_BKGTS = jnp.where(seen, jnp.exp(jnp.where(seen, s_BKGTS - m_BKGT1, 0)), 0)
    l_BKGT = jnp.sum(p_BKGTS, axis=-1)
    any_BKGT = l_BKGT > 0
    safe_l_BKGT = jnp.where(any_BKGT, l_BKGT, 1)
    o_BTKGE = jnp.einsum(
        "bkgts,bske->btkge", p_BKGTS.astype(v_BSKE.dtype), v_BSKE, preferred_element_type=acc_dtype
    )
    o_BTKGE = o_BTKGE / safe_l_BKGT.transpose(0, 3, 1, 2)[..., None]
    lse_BKGT = jnp.where(any_BKGT, m_BKGT1[..., 0] + jnp.log(safe_l_BKGT), -jnp.inf)
    return o_BTKGE.reshape(B, T, H, E), lse_BKGT.transpose(0, 3, 1, 2).reshape(B, T, H)
