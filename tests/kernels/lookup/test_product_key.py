"""Product-key top-k against all sums in NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from memtrain_kernels.lookup import product_key, product_key_topk


best_pairs = jax.jit(product_key_topk, static_argnums=2)


def all_sums(s1, s2, top_k):
    """The best of all N * N sums, in the order that the docstring gives: (sums, slots)."""
    n = s1.shape[-1]
    # How many halves are better than each: a greater score, or the same and lower.
    rank_1, rank_2 = (np.argsort(np.argsort(-s, axis=-1, kind="stable"), axis=-1) for s in (s1, s2))
    sums = (s1[..., :, None] + s2[..., None, :]).reshape(*s1.shape[:-1], n * n)
    ties = (rank_1[..., :, None] * n + rank_2[..., None, :]).reshape(sums.shape)
    slots = np.lexsort((ties, -sums), axis=-1)[..., :top_k]
    return np.take_along_axis(sums, slots, axis=-1), slots


@pytest.mark.parametrize(
    ("n", "top_k"), [(1, 1), (5, 1), (5, 5), (16, 4), (33, 7), (300, 2), (64, 32)]
)
@pytest.mark.parametrize("ties", [False, True])
def test_topk_is_that_of_all_sums(n, top_k, ties):
    rng = np.random.default_rng(n)
    draw = (lambda *a: rng.integers(-3, 4, a)) if ties else (lambda *a: rng.standard_normal(a))
    s1, s2 = draw(2, 3, 4, n).astype(np.float32)
    best, slots = best_pairs(s1, s2, top_k)
    want = all_sums(s1, s2, top_k)
    np.testing.assert_array_equal(slots, want[1])
    np.testing.assert_array_equal(best, want[0])
    assert slots.dtype == jnp.int32


def test_without_ties_any_order_is_the_order_of_sums():
    rng = np.random.default_rng(0)
    s1, s2 = rng.standard_normal((2, 9)).astype(np.float32)
    sums = (s1[:, None] + s2).reshape(-1)
    _, slots = best_pairs(s1, s2, 6)
    np.testing.assert_array_equal(slots, np.argsort(-sums)[:6])


def test_equal_half_scores_go_to_the_lower_half_slot():
    s1 = jnp.asarray([1.0, 3.0, 3.0, 3.0])
    s2 = jnp.asarray([0.0, 2.0, 0.0, 2.0])
    _, slots = best_pairs(s1, s2, 2)
    assert slots.tolist() == [1 * 4 + 1, 1 * 4 + 3]


def test_equal_sums_go_to_the_better_first_half_as_the_docstring_says():
    _, slots = best_pairs(jnp.asarray([1.0, 3.0]), jnp.asarray([0.0, 2.0]), 2)
    assert slots.tolist() == [1 * 2 + 1, 1 * 2 + 0]  # 5, then 3 + 0 before 1 + 2
    # Halves that rounding makes equal sums of: the greater half still comes first.
    _, slots = best_pairs(jnp.asarray([0.0, 1e-9]), jnp.asarray([1.0, 0.0]), 1)
    assert slots.tolist() == [1 * 2 + 0]


def test_few_sums_are_formed():
    a, b = product_key._pairs(32)
    assert len(a) == 119 and ((a + 1) * (b + 1) <= 32).all()
    text = jax.jit(lambda a, b: product_key_topk(a, b, 32)).lower(*[jnp.zeros((7, 64))] * 2)
    assert "7x119x" in text.as_text() and "7x1024x" not in text.as_text()


def test_gradient_of_the_scores_reaches_the_selected_halves_alone():
    rng = np.random.default_rng(0)
    s1, s2 = jnp.asarray(rng.normal(size=(2, 3, 20)), jnp.float32)
    w = rng.normal(size=(3, 6)).astype(np.float32)
    g1, g2 = jax.jit(jax.grad(lambda a, b: jnp.sum(product_key_topk(a, b, 6)[0] * w), (0, 1)))(
        s1, s2
    )
    slots = np.asarray(best_pairs(s1, s2, 6)[1])
    want_1, want_2 = np.zeros((2, 3, 20))
    for row, p in np.ndindex(3, 6):
        want_1[row, slots[row, p] // 20] += w[row, p]
        want_2[row, slots[row, p] % 20] += w[row, p]
    np.testing.assert_allclose(g1, want_1, atol=1e-6)
    np.testing.assert_allclose(g2, want_2, atol=1e-6)
    # Every scatter of the gradient has targets of its own: no atomics on a GPU.
    text = jax.jit(jax.grad(lambda a: best_pairs(a, s2, 6)[0].sum())).lower(s1).as_text()
    scatters = re.findall(r'"stablehlo.scatter".*?unique_indices = (\w+)', text)
    assert scatters and set(scatters) == {"true"}
    check_grads(
        lambda a, b: best_pairs(a, b, 6)[0] ** 2,
        (s1, s2),
        order=1,
        eps=1e-3,
        atol=5e-2,
        rtol=5e-2,
    )
