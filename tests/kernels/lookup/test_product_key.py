"""Product-key top-k against all sums in NumPy."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from memtrain_kernels.lookup import product_key, product_key_lookup, product_key_topk


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


@pytest.mark.parametrize("chunked", [False, True])
def test_lookup_from_queries_is_that_of_all_sums(chunked, monkeypatch):
    """Scores, slots and gradients against float64; in chunks, with one that is not full."""
    rng = np.random.default_rng(2)
    heads, n, dim, k = 2, 12, 4, 5
    q = rng.standard_normal((3, 7, heads, 2, dim))
    keys = rng.standard_normal((2, heads, n, dim))
    weights = rng.standard_normal((3, 7, heads, k))
    if chunked:  # 4 of 21 queries at a time
        module = sys.modules["memtrain_kernels.lookup.product_key_lookup"]
        monkeypatch.setattr(module, "SCORE_BYTES", 4 * 2 * heads * n * 4 + 3)

    @jax.jit
    def run(q, keys):
        def loss(q, keys):
            best, slots = product_key_lookup(q, keys, k)
            return jnp.sum(best * weights), (best, slots)

        (_, found), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(q, keys)
        return *found, *grads

    given = [jnp.asarray(x, jnp.float32) for x in (q, keys)]
    best, slots, d_q, d_keys = run(*given)
    halves = np.einsum("...hsd,shnd->s...hn", q, keys)
    want, wanted = all_sums(halves[0], halves[1], k)
    np.testing.assert_array_equal(slots, wanted)
    np.testing.assert_allclose(best, want, atol=1e-5)
    dq, dk = np.zeros_like(q), np.zeros_like(keys)
    for *at, h, p in np.ndindex(*wanted.shape):
        w = weights[*at, h, p]
        for s, i in enumerate(divmod(wanted[*at, h, p], n)):
            dq[*at, h, s] += w * keys[s, h, i]
            dk[s, h, i] += w * q[*at, h, s]
    np.testing.assert_allclose(d_q, dq, atol=1e-5)
    np.testing.assert_allclose(d_keys, dk, atol=1e-5)
    whole = f"x{3 * 7}x{n}xf32"
    assert (whole in run.lower(*given).as_text()) == (not chunked)


def test_no_half_scores_are_kept_for_the_gradient():
    """What is as wide as the half-keys is formed once, forward."""
    q, keys = jnp.ones((64, 1, 2, 4)), jnp.ones((2, 1, 48, 4))
    grad = jax.grad(lambda q, keys: product_key_lookup(q, keys, 3)[0].sum(), (0, 1))
    dots = re.findall(r"dot_general.*-> tensor<([^>]+)>", jax.jit(grad).lower(q, keys).as_text())
    assert sum("48" in shape for shape in dots) == 1
