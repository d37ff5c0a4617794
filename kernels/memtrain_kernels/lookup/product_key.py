"""Top-k over a product of two key sets (Lample et al. 2019, arXiv 1907.05242)."""

import jax
import jax.numpy as jnp
from jax import Array


def product_key_topk(scores_1: Array, scores_2: Array, top_k: int) -> tuple[Array, Array]:
    """The `top_k` best of all sums s1[i] + s2[j], without forming them all.

    A pair among the k best sums has each half among the k best of its own set, so k*k sums suffice.
    Args:
        scores_1, scores_2: float [..., N]: a query's half-scores. 1 <= top_k <= N.
    Returns:
        scores float [..., k], best first, differentiable; slots int32 [..., k] = i * N + j.
        Ties go to the lower half-slots, i before j.
    """
    n = scores_1.shape[-1]
    if not 1 <= top_k <= n:
        raise ValueError(f"top_k={top_k} must be between 1 and the {n} half-keys")
    half_1, i = jax.lax.top_k(scores_1, top_k)
    half_2, j = jax.lax.top_k(scores_2, top_k)
    sums = half_1[..., :, None] + half_2[..., None, :]
    best, pair = jax.lax.top_k(sums.reshape(*sums.shape[:-2], top_k * top_k), top_k)
    slot_i = jnp.take_along_axis(i, pair // top_k, axis=-1)
    slot_j = jnp.take_along_axis(j, pair % top_k, axis=-1)
    return best, (slot_i * n + slot_j).astype(jnp.int32)
