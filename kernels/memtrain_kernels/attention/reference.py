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
    B, T, H, _ = q_BTHD.shape
    E = v_BSKE.shape[3]
    acc_dtype = jnp.promote_types(q_BTHD.dtype, jnp.float32)
    s_BKGTS = _scores(q_BTHD, k_BSKD, spec)
    seen = _seen(T, k_BSKD.shape[1], (q_pos, kv_pos, q_seg, kv_seg), spec)
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


def gradients(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKE: jax.Array,
    q_pos: jax.Array | None,
    kv_pos: jax.Array | None,
    q_seg: jax.Array | None,
    kv_seg: jax.Array | None,
    spec: AttentionSpec,
    do_BTHE: jax.Array,
    lse_BTH: jax.Array,
    delta_BTH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What these keys add to dq, dk and dv; as xla.gradients."""
    B, T, H, D = q_BTHD.shape
    K = k_BSKD.shape[2]
    acc_dtype = jnp.promote_types(q_BTHD.dtype, jnp.float32)
    by_rows = lambda x: x.reshape(B, T, K, H // K).transpose(0, 2, 3, 1)[..., None]  # noqa: E731
    lse_BKGT1, delta_BKGT1 = by_rows(lse_BTH), by_rows(delta_BTH)
    s_BKGTS = _scores(q_BTHD, k_BSKD, spec)
    seen = _seen(T, k_BSKD.shape[1], (q_pos, kv_pos, q_seg, kv_seg), spec)
    seen = seen & (lse_BKGT1 > -jnp.inf)
    p_BKGTS = jnp.where(seen, jnp.exp(jnp.where(seen, s_BKGTS - lse_BKGT1, 0)), 0)
    do_BTKGE = do_BTHE.reshape(B, T, K, H // K, -1).astype(acc_dtype)
    dp_BKGTS = jnp.einsum("btkge,bske->bkgts", do_BTKGE, v_BSKE.astype(acc_dtype))
    ds_BKGTS = p_BKGTS * (dp_BKGTS - delta_BKGT1)
    if spec.soft_cap is not None:
        ds_BKGTS = ds_BKGTS * (1 - jnp.square(s_BKGTS / spec.soft_cap))
    ds_BKGTS = ds_BKGTS * spec.scale_for(D)
    q_BTKGD = q_BTHD.reshape(B, T, K, H // K, D).astype(acc_dtype)
    dq_BTKGD = jnp.einsum("bkgts,bskd->btkgd", ds_BKGTS, k_BSKD.astype(acc_dtype))
    dk_BSKD = jnp.einsum("bkgts,btkgd->bskd", ds_BKGTS, q_BTKGD)
    dv_BSKE = jnp.einsum("bkgts,btkge->bske", p_BKGTS, do_BTKGE)
    return dq_BTKGD.reshape(B, T, H, D), dk_BSKD, dv_BSKE


def _scores(q_BTHD: jax.Array, k_BSKD: jax.Array, spec: AttentionSpec) -> jax.Array:
    """Scaled, capped scores [B, K, G, T, S], not masked."""
    B, T, H, D = q_BTHD.shape
    K = k_BSKD.shape[2]
    q_BTKGD = q_BTHD.reshape(B, T, K, H // K, D)
    s_BKGTS = jnp.einsum(
        "btkgd,bskd->bkgts",
        q_BTKGD,
        k_BSKD,
        preferred_element_type=jnp.promote_types(q_BTHD.dtype, jnp.float32),
    )
    s_BKGTS = s_BKGTS * spec.scale_for(D)
    if spec.soft_cap is not None:
        s_BKGTS = spec.soft_cap * jnp.tanh(s_BKGTS / spec.soft_cap)
    return s_BKGTS


def _seen(T: int, S: int, given: tuple, spec: AttentionSpec) -> jax.Array:
    """Which query sees which key: bool, broadcast against [B, K, G, T, S]."""
    q_pos, kv_pos, q_seg, kv_seg = fill_defaults(T, S, *given)
    seen_BTS = visible(
        spec, q_pos[:, :, None], kv_pos[:, None, :], q_seg[:, :, None], kv_seg[:, None, :]
    )
    return seen_BTS[:, None, None]
