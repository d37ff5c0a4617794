"""Top-k over a product of two key sets (Lample et al. 2019, arXiv 1907.05242)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from memtrain_kernels.lookup.checks import Arrays, check_dtype
from memtrain_kernels.lookup.topk import best_columns


def product_key_topk(scores_1: Arrays, scores_2: Arrays, top_k: int) -> tuple[Array, Array]:
    """The `top_k` best of all sums s1[i] + s2[j], without forming them all.

    The pair of the a-th best i and the b-th best j (from 1) is behind a * b - 1 others, so only
    pairs with a * b <= k can be picked: about k ln k sums.
    Args:
        scores_1, scores_2: float [..., N]: a query's half-scores. 1 <= top_k <= N.
    Returns:
        scores float [..., k], best first, differentiable; slots int32 [..., k] = i * N + j.
        Of equal sums the one with the better i comes first, then the one with the better j; of two
        halves the one with the greater score is better, then the lower one. This is the order of
        all N * N sums, as they are rounded: so equal half-scores go to the lower half-slots, but
        3 + 0 comes before 1 + 2 even where the slot of 1 + 2 is lower. A -0 may come after a 0.
    Raises ValueError for shapes and dtypes that do not fit.
    """
    for name, scores in (("scores_1", scores_1), ("scores_2", scores_2)):
        check_dtype(name, scores, jnp.floating, "a floating dtype")
    if scores_1.shape != scores_2.shape or not scores_1.ndim:
        raise ValueError(
            f"scores_2 has shape {scores_2.shape}: give that of scores_1, {scores_1.shape}"
        )
    n = scores_1.shape[-1]
    if not 1 <= top_k <= n:
        raise ValueError(f"top_k={top_k} must be between 1 and the {n} half-keys")
    scores_1, scores_2 = jnp.asarray(scores_1), jnp.asarray(scores_2)
    i, j = (best_columns(scores, top_k) for scores in (scores_1, scores_2))
    return best_pairs(take(scores_1, i), take(scores_2, j), i, j, n)


def best_pairs(half_1: Array, half_2: Array, i: Array, j: Array, n: int) -> tuple[Array, Array]:
    """Scores and slots [..., k] of the best sums of two halves' best scores [..., k], best first,
    which are those of half-slots i and j of n."""
    top_k = half_1.shape[-1]
    # Kept apart: fused, XLA on CPU would gather the halves anew for every sum.
    halves = lax.optimization_barrier((half_1, half_2))
    sums = lax.optimization_barrier(_sums(*halves))
    pair = best_columns(sums, top_k)
    a, b = _pairs(top_k)
    slots = i[..., a] * n + j[..., b]
    return take(sums, pair), take(slots, pair)


@functools.cache
def _pairs(top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """The ranks (from 0) of the halves of all pairs that can be picked, in order."""
    pairs = [(a, b) for a in range(top_k) for b in range(top_k // (a + 1))]
    a, b = np.array(pairs, np.int32).T
    return a, b


@jax.custom_jvp
def _sums(half_1: Array, half_2: Array) -> Array:
    """half_1[a] + half_2[b] of all pairs, from halves [..., k] best first."""
    a, b = _pairs(half_1.shape[-1])
    return half_1[..., a] + half_2[..., b]


@_sums.defjvp
def _sums_jvp(primals, tangents):
    # As products with matrices of 0 and 1: transposed they are sums in fixed order, where those of
    # the gathers would be scatter-adds to repeated places.
    top_k = primals[0].shape[-1]
    parts = [
        jnp.matmul(
            tangent, jnp.asarray(np.eye(top_k)[:, ranks], tangent.dtype), precision="highest"
        )
        for tangent, ranks in zip(tangents, _pairs(top_k), strict=True)
    ]
    return _sums(*primals), parts[0] + parts[1]


def take(x: Array, columns: Array) -> Array:
    """x[..., columns], the columns of a row all different: its transpose needs no atomics."""
    rows, last = tuple(range(x.ndim - 1)), (x.ndim - 1,)
    return lax.gather(
        x,
        columns[..., None],
        lax.GatherDimensionNumbers(
            offset_dims=(),
            collapsed_slice_dims=last,
            start_index_map=last,
            operand_batching_dims=rows,
            start_indices_batching_dims=rows,
        ),
        slice_sizes=(1,) * x.ndim,
        unique_indices=True,
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
