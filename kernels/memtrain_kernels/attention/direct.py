"""A few queries against a cache as it lies: the forward pass of decoding, without a loop or a copy.

The other forms bring keys and values to [B, K, S, D] first, which for one query costs several times
the attention itself. Here heads and dims of the cache are one axis, [B, S, K * D], and each query
is padded with zeros for the other heads: K times the arithmetic on a product that waits for memory
anyway.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from memtrain_kernels.attention import tiles
from memtrain_kernels.attention.blocks import Plan
from memtrain_kernels.attention.tiles import Scaling, Tokens


_MAX_ROWS = 8
_MAX_KV_HEADS = 16


def serves(plan: Plan, num_kv_heads: int, group: int) -> bool:
    """Whether this form is the cheapest: one tile, few rows a key head, few key heads.

    One device, too: where heads are sharded over several, joining them with dims gathers the cache.
    """
    one_tile = plan.num_q * plan.num_kv == 1
    few = plan.T * group <= _MAX_ROWS and num_kv_heads <= _MAX_KV_HEADS
    return one_tile and few and jax.device_count() == 1


def forward(
    plan: Plan,
    scaling: Scaling,
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKE: jax.Array,
    tokens: Tokens,
) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, E] and lse [B, T, H]."""
    B, T, H, D = q_BTHD.shape
    S, K, E = v_BSKE.shape[1:]
    G = H // K
    own_K1K1 = jnp.eye(K, dtype=bool)[:, None, :, None]
    q_BTKGKD = jnp.where(own_K1K1, q_BTHD.reshape(B, T, K, G, 1, D), 0)
    q_BTHX = q_BTKGKD.reshape(B, T, H, K * D)
    # Keys first: with one row and the queries first, XLA on CPU lays the whole cache out anew.
    s_BSTH = tiles.product("bsx,bthx->bsth", k_BSKD.reshape(B, S, K * D), q_BTHX)
    s_BTHS = s_BSTH.transpose(0, 2, 3, 1)
    s_BTHS = tiles.cap(plan.spec, scaling, s_BTHS)
    s_BTHS = jnp.minimum(s_BTHS, tiles.ceiling(plan.spec, tokens, s_BTHS.dtype)[:, :, None])
    m_BTH1 = jnp.max(s_BTHS, axis=-1, keepdims=True)
    p_BTHS = jnp.exp(s_BTHS - tiles.finite(m_BTH1))
    l_BTH1 = jnp.maximum(jnp.sum(p_BTHS, axis=-1, keepdims=True), 1)  # as in tiles.finish
    v_BSX = v_BSKE.reshape(B, S, K * E)
    o_BTHX = tiles.product("bths,bsx->bthx", p_BTHS.astype(v_BSX.dtype), v_BSX)
    o_BTKGKE = o_BTHX.reshape(B, T, K, G, K, E)
    o_BTHE = jnp.sum(jnp.where(own_K1K1, o_BTKGKE, 0), axis=4).reshape(B, T, H, E)
    return o_BTHE / l_BTH1, (m_BTH1 + jnp.log(l_BTH1))[..., 0]
