"""The gradient of a lookup's scores: to the queries and the picked keys, and to nothing else."""

import jax
import jax.numpy as jnp
import lookup_oracle as oracle
import numpy as np
import pytest

from memtrain_kernels.lookup import memory_topk


def draw(rng, *shape, dtype="float32"):
    return jnp.asarray(rng.standard_normal(shape), dtype)


@pytest.mark.parametrize("key_batch", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_against_the_oracle(key_batch, dtype):
    rng = np.random.default_rng(0)
    q, keys = draw(rng, 2, 5, 4, 8, dtype=dtype), draw(rng, key_batch, 37, 2, 8, dtype=dtype)
    # Few keys of segment 2 are seen, so some picks are missing; none of segment 3.
    q_seg, kv_seg = rng.integers(0, 4, (2, 5)), rng.integers(0, 2, (2, 37))
    kv_seg[:, 5:7] = 2
    q_seg[0, :2] = 2, 3
    weight = draw(rng, 2, 5, 4, 6)

    @jax.jit
    def gradients(q, keys):
        def loss(q, keys):
            scores, _ = memory_topk(
                q, keys, 6, q_segments=q_seg, kv_segments=kv_seg, block_keys=16, block_queries=2
            )
            return jnp.sum(jnp.where(jnp.isfinite(scores), scores, 0) * weight)

        return jax.grad(loss, (0, 1))(q, keys)

    d_q, d_keys = gradients(q, keys)
    positions = np.tile(np.arange(5), (2, 1)), np.tile(np.arange(37), (2, 1))
    _, indices = oracle.topk(q, keys, 6, positions=positions, segments=(q_seg, kv_seg))
    want_q, want_keys = oracle.topk_gradients(q, keys, indices, weight)
    assert (d_q.dtype, d_keys.dtype) == (q.dtype, keys.dtype)
    tolerance = 1e-6 if dtype == "float32" else 1e-2  # one rounding to bfloat16
    oracle.close(d_q, want_q, tolerance)
    oracle.close(d_keys, want_keys, tolerance)
    assert (np.asarray(d_q)[0, 1] == 0).all() and (want_keys == 0).any()
    for ours, again in zip((d_q, d_keys), gradients(q, keys), strict=True):
        np.testing.assert_array_equal(ours, again)


def test_missing_picks_pass_nothing_back_even_if_their_cotangent_is_no_number():
    q, keys = jnp.ones((1, 2)), jnp.ones((5, 2))
    find = lambda q, keys: memory_topk(q, keys, 3, kv_segments=np.array([0, -1, -1, 0, 1]))  # noqa: E731
    (_, indices), pull = jax.vjp(find, q, keys)
    assert indices.tolist() == [[0, 3, -1]]
    d_q, d_keys = pull((jnp.array([[1.0, 2.0, jnp.nan]]), np.zeros((1, 3), jax.dtypes.float0)))
    assert d_q.tolist() == [[3, 3]]
    assert d_keys.tolist() == [[1, 1], [0, 0], [0, 0], [2, 2], [0, 0]]


@pytest.mark.parametrize(("dtype", "heads"), [("int8", False), ("float8_e5m2", True)])
def test_stored_keys_pass_gradients_to_the_queries_alone(dtype, heads):
    rng = np.random.default_rng(1)
    q = draw(rng, 1, 3, 2, 4)
    keys = jnp.asarray(rng.integers(-4, 5, (1, 33, 2, 4)), dtype)
    shape = (2,) if heads else (1, 33, 2)
    scales = jnp.asarray(2.0 ** rng.integers(-2, 3, shape), jnp.float32)
    weight = draw(rng, 1, 3, 2, 4)

    def loss(q, keys, scales):
        return jnp.sum(memory_topk(q, keys, 4, key_scales=scales)[0] * weight)

    d_q = jax.grad(loss)(q, keys, scales)
    full = np.broadcast_to(scales, (1, 33, 2))
    _, indices = oracle.topk(q, keys, 4, scales=full)
    want, _ = oracle.topk_gradients(q, keys, indices, weight, full)
    oracle.close(d_q, want, 1e-6)
    with pytest.raises(ValueError, match=r"key_scales of a lookup in .* keys have no gradient"):
        jax.grad(loss, 2)(q, keys, scales)
    if dtype != "int8":
        with pytest.raises(ValueError, match=r"keys of a lookup in .* keys have no gradient"):
            jax.grad(loss, 1)(q, keys, scales)


def test_the_choice_has_no_gradient_and_training_through_vmap_and_remat_works():
    rng = np.random.default_rng(2)
    q, keys, values = draw(rng, 3, 4, 8), draw(rng, 3, 20, 8), draw(rng, 3, 20, 2)

    def read(q, keys, values):
        scores, indices = memory_topk(q, keys, 5, block_keys=8)
        return jnp.einsum("mk,mkd->md", jax.nn.softmax(scores), values[indices])

    def loss(q, keys, values):
        return jnp.sum(jnp.sin(jax.vmap(jax.checkpoint(read))(q, keys, values)))

    def dense(q, keys, values):
        total = 0
        for one, some, rows in zip(q, keys, values, strict=True):
            scores = jnp.matmul(one, some.T, precision="highest")
            best = np.argsort(-np.asarray(jax.lax.stop_gradient(scores)), axis=-1)[:, :5]
            weights = jax.nn.softmax(jnp.take_along_axis(scores, jnp.asarray(best), axis=-1))
            total += jnp.sum(jnp.sin(jnp.einsum("mk,mkd->md", weights, rows[best])))
        return total

    ours = jax.jit(jax.grad(loss, (0, 1, 2)))(q, keys, values)
    theirs = []
    for n, x in enumerate((q, keys, values)):  # numerically, along random directions
        direction = draw(rng, *x.shape)
        step = [[q, keys, values] for _ in range(2)]
        step[0][n], step[1][n] = x + 1e-2 * direction, x - 1e-2 * direction
        theirs.append((jnp.sum(ours[n] * direction), (dense(*step[0]) - dense(*step[1])) / 2e-2))
    for derivative, difference in theirs:
        np.testing.assert_allclose(derivative, difference, rtol=2e-2, atol=2e-2)
