"""Product-key lookup from queries and half-keys: half-scores are formed a few tokens at a time.

All that a gradient needs of them are the best k of each half, so none is kept, or formed again
backward: there, a query's halves are a bag of the half-keys that they picked, and half-keys get
sums over their bags.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from memtrain_kernels.lookup.bag_gradient import sum_by_row
from memtrain_kernels.lookup.checks import Arrays, check_count, check_dtype
from memtrain_kernels.lookup.product_key import best_pairs, take
from memtrain_kernels.lookup.topk import best_columns
from memtrain_kernels.lookup.weighted_gather import bag
from memtrain_kernels.varying import vary_alike, vary_as


# Half-scores that exist at the same time, of all heads and both halves.
SCORE_BYTES = 2**25


def product_key_lookup(queries: Arrays, half_keys: Arrays, top_k: int) -> tuple[Array, Array]:
    """The `top_k` best of all sums q1 . K1[i] + q2 . K2[j], for each query of each head.

    Args:
        queries: [..., H, 2, D], both halves. half_keys: [2, H, N, D]. 1 <= top_k <= N.
    Returns:
        scores float32 [..., H, k] (float64 for float64 operands), best first; slots int32
        [..., H, k] = i * N + j. The order is that of `product_key_topk`. Gradients of the scores
        reach the queries and the half-keys that were picked, in fixed order and without atomics.
    Raises ValueError for shapes and dtypes that do not fit.
    """
    for name, x in (("queries", queries), ("half_keys", half_keys)):
        check_dtype(name, x, jnp.floating, "a floating dtype")
    if half_keys.ndim != 4 or half_keys.shape[0] != 2:
        raise ValueError(f"half_keys has shape {half_keys.shape}: give [2, H, N, D]")
    _, H, N, D = half_keys.shape
    if queries.ndim < 3 or queries.shape[-3:] != (H, 2, D):
        raise ValueError(f"queries has shape {queries.shape}: give [..., {H}, 2, {D}]")
    check_count("top_k", top_k, 1, N)
    queries, half_keys = vary_alike(jnp.asarray(queries), jnp.asarray(half_keys))
    # G: heads, and the two halves of each. Queries are not laid out anew, they are many.
    q_MGD = queries.reshape(-1, 2 * H, D)
    keys_GND = half_keys.swapaxes(0, 1).reshape(2 * H, N, D)
    scores, columns = (x.reshape(-1, H, 2, top_k) for x in _halves(top_k, q_MGD, keys_GND))
    best, slots = best_pairs(
        scores[..., 0, :], scores[..., 1, :], columns[..., 0, :], columns[..., 1, :], N
    )
    shape = (*queries.shape[:-2], top_k)
    return best.reshape(shape), slots.reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _halves(top_k: int, q_MGD: Array, keys_GND: Array) -> tuple[Array, Array]:
    """Scores and columns [M, G, k] of the best keys of each query, best first."""
    M, G, D = q_MGD.shape
    dtype = jnp.result_type(q_MGD.dtype, keys_GND.dtype, jnp.float32)

    def pick(q_CGD: Array) -> tuple[Array, Array]:
        # Keys last, as top-k wants them.
        scores_GCN = lax.dot_general(
            q_CGD, keys_GND, (((2,), (2,)), ((1,), (0,))), preferred_element_type=dtype
        )
        columns = best_columns(scores_GCN, top_k)
        return take(scores_GCN, columns).swapaxes(0, 1), columns.swapaxes(0, 1)

    fit = max(1, SCORE_BYTES // (G * keys_GND.shape[1] * dtype.itemsize))
    least = -(-M // fit)
    if least <= 1:
        return pick(q_MGD)
    # Chunks that are all full, if there are not many more of them for it.
    count = next((c for c in range(least, 2 * least) if M % c == 0), least)
    chunk = -(-M // count)
    padded = jnp.pad(q_MGD, ((0, count * chunk - M), (0, 0), (0, 0)))
    found = lax.map(pick, padded.reshape(count, chunk, G, D))
    scores, columns = (x.reshape(count * chunk, G, top_k)[:M] for x in found)
    return scores, columns


def _forward(top_k, q_MGD, keys_GND):
    scores, columns = _halves(top_k, q_MGD, keys_GND)
    return (scores, columns), (q_MGD, keys_GND, columns)


def _backward(top_k, saved, cotangents):
    q_MGD, keys_GND, columns_MGk = saved
    (M, G, D), N = q_MGD.shape, keys_GND.shape[1]
    slots = columns_MGk + N * jnp.arange(G, dtype=jnp.int32)[:, None]
    slots, d_scores = (x.reshape(M * G, top_k) for x in (slots, cotangents[0]))
    d_q = lax.platform_dependent(
        keys_GND.reshape(G * N, D), slots, d_scores, cpu=_bag_in_turn, default=bag
    )
    d_keys = sum_by_row(slots, d_scores, q_MGD.reshape(M * G, D), G * N)
    return (
        d_q.reshape(q_MGD.shape).astype(q_MGD.dtype),
        d_keys.reshape(keys_GND.shape).astype(keys_GND.dtype),
    )


def _bag_in_turn(table_ND: Array, slots_MK: Array, weights_MK: Array) -> Array:
    """`bag`, a column of slots at a time: XLA on CPU gathers narrow rows of all columns first, and
    holds them side by side."""

    def add(y_MD: Array, column: tuple[Array, Array]) -> tuple[Array, None]:
        slots_M, weights_M = column
        return y_MD + weights_M[:, None] * table_ND[slots_M].astype(y_MD.dtype), None

    zeros = jnp.zeros((slots_MK.shape[0], table_ND.shape[1]), weights_MK.dtype)
    return lax.scan(add, vary_as(zeros, weights_MK), (slots_MK.T, weights_MK.T))[0]


_halves.defvjp(_forward, _backward)
