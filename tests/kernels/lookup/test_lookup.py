"""Product-key top-k and the weighted gather against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from memtrain_kernels import product_key_topk, weighted_gather


@pytest.mark.parametrize(("n", "top_k"), [(1, 1), (5, 1), (5, 5), (16, 4), (33, 7)])
def test_topk_is_that_of_all_sums(n, top_k):
    rng = np.random.default_rng(n)
    s1, s2 = rng.normal(size=(2, 3, 4, n)).astype(np.float32)
    best, slots = product_key_topk(jnp.asarray(s1), jnp.asarray(s2), top_k)
    sums = (s1[..., :, None] + s2[..., None, :]).reshape(3, 4, n * n)
    want = np.argsort(-sums, axis=-1, kind="stable")[..., :top_k]
    np.testing.assert_array_equal(slots, want)
    np.testing.assert_array_equal(best, np.take_along_axis(sums, want, axis=-1))
    assert slots.dtype == jnp.int32


def test_equal_half_scores_go_to_the_lower_half_slot():
    s1 = jnp.asarray([1.0, 3.0, 3.0, 3.0])
    s2 = jnp.asarray([0.0, 2.0, 0.0, 2.0])
    _, slots = product_key_topk(s1, s2, 2)
    assert slots.tolist() == [1 * 4 + 1, 1 * 4 + 3]


def test_an_impossible_top_k_is_refused():
    with pytest.raises(ValueError, match="top_k=6 must be between 1 and the 5 half-keys"):
        product_key_topk(jnp.zeros(5), jnp.zeros(5), 6)


def test_gradient_of_the_scores_reaches_the_selected_halves_alone():
    rng = np.random.default_rng(0)
    s1, s2 = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)
    w = jnp.asarray([2.0, -3.0])
    g1, g2 = jax.grad(lambda a, b: product_key_topk(a, b, 2)[0] @ w, argnums=(0, 1))(s1, s2)
    _, slots = product_key_topk(s1, s2, 2)
    want_1, want_2 = np.zeros((2, 6))
    for weight, slot in zip([2.0, -3.0], slots.tolist(), strict=True):
        want_1[slot // 6] += weight
        want_2[slot % 6] += weight
    np.testing.assert_allclose(g1, want_1)
    np.testing.assert_allclose(g2, want_2)


def draw(M=7, N=5, D=3, K=4):
    rng = np.random.default_rng(0)
    table, weights = rng.normal(size=(N, D)), rng.normal(size=(M, K))
    slots = rng.integers(0, N, (M, K))
    slots[0] = 2  # one row read several times for one query
    return table, slots, weights


def test_gather_is_the_weighted_sum_of_rows():
    table, slots, weights = draw()
    y = weighted_gather(*map(jnp.asarray, (np.float32(table), slots, np.float32(weights))))
    np.testing.assert_allclose(y, np.einsum("mk,mkd->md", weights, table[slots]), atol=1e-6)


def test_gather_gradients_are_a_scatter_and_dot_products():
    table, slots, weights = draw()
    dy = np.random.default_rng(1).normal(size=(7, 3))
    loss = lambda t, w: jnp.sum(weighted_gather(t, jnp.asarray(slots), w) * dy)  # noqa: E731
    d_table, d_weights = jax.grad(loss, argnums=(0, 1))(
        jnp.asarray(table, jnp.float32), jnp.asarray(weights, jnp.float32)
    )
    want = np.zeros_like(table)
    for m in range(7):
        for k in range(4):
            want[slots[m, k]] += weights[m, k] * dy[m]
    np.testing.assert_allclose(d_table, want, atol=1e-5)
    np.testing.assert_allclose(d_weights, np.einsum("md,mkd->mk", dy, table[slots]), atol=1e-5)
    check_grads(
        lambda t, w: weighted_gather(t, jnp.asarray(slots), w),
        (jnp.asarray(table, jnp.float32), jnp.asarray(weights, jnp.float32)),
        order=1,
        modes=["rev"],
        atol=1e-2,
        rtol=1e-2,
    )


def test_gather_keeps_dtypes_and_sums_in_float32():
    table, slots, weights = draw(K=4)
    many = np.full((1, 512), 1)
    row = jnp.asarray(table, jnp.bfloat16)
    y = weighted_gather(row, jnp.asarray(many), jnp.full((1, 512), 1 / 512, jnp.float32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y[0], row[1])
    gradient = jax.grad(
        lambda t, w: weighted_gather(t, jnp.asarray(slots), w).astype(jnp.float32).sum(), (0, 1)
    )(row, jnp.asarray(weights, jnp.bfloat16))
    assert [g.dtype for g in gradient] == [jnp.bfloat16, jnp.bfloat16]
