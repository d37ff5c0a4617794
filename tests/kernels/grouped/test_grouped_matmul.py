"""The grouped product and the rows' way there and back, against loops over rows in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrain_kernels import assign, compiling_for, grouped_matmul
from memtrain_kernels.grouped.tiles import tile_rows


D, F, G = 5, 7, 4


def by_hand(rows, weights, sizes, d_out):
    """Result and both gradients, row by row."""
    out, d_rows, d_weights = (
        np.zeros((len(rows), weights.shape[2])),
        np.zeros(rows.shape),
        np.zeros(weights.shape),
    )
    row = 0
    for group, size in enumerate(sizes):
        for _ in range(size):
            out[row] = rows[row] @ weights[group]
            d_rows[row] = weights[group] @ d_out[row]
            d_weights[group] += np.outer(rows[row], d_out[row])
            row += 1
    return out, d_rows, d_weights


@pytest.fixture(scope="module", params=["xla", "reference"])
def program(request):
    """Result and gradients of 70 rows; compiled once."""

    @jax.jit
    def run(rows, weights, sizes, d_out):
        function = lambda r, w: grouped_matmul(r, w, sizes, backend=request.param)  # noqa: E731
        out, pull = jax.vjp(function, rows, weights)
        return out, *pull(d_out)

    return run


@settings(max_examples=30)
@given(st.lists(st.integers(0, 40), min_size=G, max_size=G), st.integers(0, 9))
def test_any_sizes_against_a_loop_over_rows(program, sizes, seed):
    count = 70
    # The rest may be of no group: what a device has for experts of others.
    sizes = [min(size, max(0, count - sum(sizes[:i]))) for i, size in enumerate(sizes)]
    rng = np.random.default_rng(seed)
    rows, weights, d_out = (rng.normal(size=s) for s in ((count, D), (G, D, F), (count, F)))
    got = program(
        *(jnp.asarray(a, jnp.float32) for a in (rows, weights)),
        jnp.asarray(sizes, jnp.int32),
        jnp.asarray(d_out, jnp.float32),
    )
    for mine, want in zip(got, by_hand(rows, weights, sizes, d_out), strict=True):
        np.testing.assert_allclose(mine, want, atol=2e-5)


def test_narrow_operands_are_summed_wide():
    """A sum that bfloat16 loses: 2,048 rows of one group, each adding one."""
    count = 2048
    rows, weights = jnp.ones((count, 1), jnp.bfloat16), jnp.ones((1, 1, 1), jnp.float32)
    sizes = jnp.asarray([count], jnp.int32)
    total = lambda w: jnp.sum(grouped_matmul(rows, w, sizes, out_dtype=jnp.float32))  # noqa: E731
    value, gradient = jax.value_and_grad(total)(weights)
    assert value == count and gradient == count and gradient.dtype == jnp.float32


def test_a_loop_is_as_long_as_the_groups_are():
    """Rows of no group are not multiplied: results where they hold no numbers."""
    rows = jnp.full((64, D), jnp.nan).at[:9].set(1.0)
    sizes = jnp.asarray([4, 0, 5, 0], jnp.int32)
    weights = jnp.ones((G, D, F))
    out, pull = jax.vjp(lambda w: grouped_matmul(rows, w, sizes), weights)
    np.testing.assert_array_equal(out[:, 0], np.where(np.arange(64) < 9, D, 0.0))
    d_out = jnp.ones_like(out).at[9:].set(jnp.nan)
    np.testing.assert_array_equal(pull(d_out)[0][:, 0, 0], [4, 0, 5, 0])


@pytest.mark.parametrize(
    ("count", "groups", "want"), [(16, 8, 8), (4096, 16, 128), (4096, 1, 256), (1, 1, 8)]
)
def test_a_tile_is_half_a_group(count, groups, want):
    assert tile_rows(count, groups) == want


def test_experts_and_back():
    """Every token's rows lie with its experts; back, they are weighted and added up."""
    rng = np.random.default_rng(0)
    tokens, top_k, experts = 11, 2, 6
    chosen = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])
    x = rng.normal(size=(tokens, 3))
    weights = rng.uniform(size=(tokens, top_k))
    factor = rng.normal(size=experts)

    for first, here in ((0, experts), (2, 3)):
        way = assign(jnp.asarray(chosen), here, first)
        own = (chosen >= first) & (chosen < first + here)
        assert np.array_equal(way.sizes, [(chosen == first + e).sum() for e in range(here)])
        rows = np.asarray(way.dispatch(jnp.asarray(x)))
        end = own.sum()
        of_row = np.repeat(np.arange(here), way.sizes)
        assert np.array_equal(chosen.reshape(-1)[np.asarray(way.order)][:end] - first, of_row)
        np.testing.assert_allclose(rows[:end], x[np.asarray(way.order)[:end] // top_k], rtol=1e-6)

        def both_ways(x, weights, way=way, first=first, here=here):
            scale = jnp.repeat(
                jnp.asarray(factor[first : first + here]),
                way.sizes,
                total_repeat_length=tokens * top_k,
            )
            scale = jnp.where(jnp.arange(tokens * top_k) < jnp.sum(way.sizes), scale, 0)
            return way.combine(way.dispatch(x) * scale[:, None], weights)

        share = (weights * factor[chosen] * own).sum(1)
        d = rng.normal(size=x.shape)
        out, pull = jax.vjp(both_ways, jnp.asarray(x), jnp.asarray(weights))
        d_x, d_weights = pull(jnp.asarray(d, out.dtype))
        np.testing.assert_allclose(out, share[:, None] * x, atol=1e-5)
        np.testing.assert_allclose(d_x, share[:, None] * d, atol=1e-5)
        want = (factor[chosen] * own) * (x * d).sum(1)[:, None]
        np.testing.assert_allclose(d_weights, want, atol=1e-5)


def test_errors_say_what_fits():
    rows, weights = jnp.zeros((4, D)), jnp.zeros((G, D, F))
    sizes = jnp.zeros((G,), jnp.int32)
    with pytest.raises(ValueError, match=r"rows \(4, 5\) and weights \(4, 7, 5\)"):
        grouped_matmul(rows, weights.swapaxes(1, 2), sizes)
    with pytest.raises(ValueError, match=r"group_sizes is int32\[3\]: it takes int32 \[4\]"):
        grouped_matmul(rows, weights, sizes[:3])
    with pytest.raises(ValueError, match=r"backend='ragged' on cpu.*'xla' fits"):
        grouped_matmul(rows, weights, sizes, backend="ragged")
    with pytest.raises(ValueError, match="there are reference, xla, ragged"):
        grouped_matmul(rows, weights, sizes, backend="pallas")  # type: ignore[arg-type]


@pytest.mark.parametrize("device", [("tpu", "TPU v5e"), ("gpu", "NVIDIA H200")])
def test_what_other_devices_are_given(device):
    """TPU multiplies ragged groups itself, a GPU's loop has a fixed length: both right here too."""
    rng = np.random.default_rng(0)
    rows, weights, d_out = (rng.normal(size=s) for s in ((9, D), (3, D, F), (9, F)))
    sizes = [4, 0, 3]
    with compiling_for(*device):
        out, pull = jax.vjp(
            lambda r, w: grouped_matmul(r, w, jnp.asarray(sizes, jnp.int32)),
            jnp.asarray(rows, jnp.float32),
            jnp.asarray(weights, jnp.float32),
        )
        got = out, *pull(jnp.asarray(d_out, jnp.float32))
    for mine, want in zip(got, by_hand(rows, weights, sizes, d_out), strict=True):
        np.testing.assert_allclose(mine, want, atol=2e-5)
