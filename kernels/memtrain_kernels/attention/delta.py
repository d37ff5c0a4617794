"""What a row's softmax takes off the gradient of its scores: shared by every backward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def delta_of(
    o_BTHE: jax.Array, lse_BTH: jax.Array, do_BTHE: jax.Array, dlse_BTH: jax.Array
) -> jax.Array:
    """rowsum(do * o) - dlse, float32 or wider, [B, T, H] (FlashAttention, arXiv 2205.14135).

    A row that saw nothing has no gradient, whatever the cotangent of its lse of -inf.
    """
    dtype = jnp.promote_types(lse_BTH.dtype, jnp.float32)
    product_BTH = jnp.sum(do_BTHE.astype(dtype) * o_BTHE.astype(dtype), axis=-1)
    return jnp.where(lse_BTH > -jnp.inf, product_BTH - dlse_BTH, 0)
