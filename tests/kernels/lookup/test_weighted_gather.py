"""The weighted gather and both forms of its table gradient against NumPy in float64."""

import jax
import jax.numpy as jnp
import lookup_oracle as oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from memtrain_kernels.lookup import bag_gradient, weighted_gather


FORMS = (bag_gradient.scatter, bag_gradient.sorted_runs)


def draw(M=7, N=5, D=3, K=4):
    rng = np.random.default_rng(0)
    table, weights = rng.normal(size=(N, D)), rng.normal(size=(M, K))
    slots = rng.integers(0, N, (M, K))
    slots[0] = 2  # one row read several times for one query
    slots[1, :2] = -1  # and a query that reads less than the others
    return table, slots, weights


def test_gather_is_the_weighted_sum_of_rows():
    table, slots, weights = draw()
    y = weighted_gather(*map(jnp.asarray, (np.float32(table), slots, np.float32(weights))))
    np.testing.assert_allclose(y, oracle.bag(table, slots, weights), atol=1e-6)


def test_gather_gradients_are_row_sums_and_dot_products():
    table, slots, weights = draw()
    dy = np.random.default_rng(1).normal(size=(7, 3))
    loss = lambda t, w: jnp.sum(weighted_gather(t, jnp.asarray(slots), w) * dy)  # noqa: E731
    arguments = jnp.asarray(table, jnp.float32), jnp.asarray(weights, jnp.float32)
    d_table, d_weights = jax.grad(loss, argnums=(0, 1))(*arguments)
    want = np.where(slots < 0, 0, np.einsum("md,mkd->mk", dy, table[slots]))
    np.testing.assert_allclose(d_table, oracle.table_gradient(slots, weights, dy, 5), atol=1e-5)
    np.testing.assert_allclose(d_weights, want, atol=1e-5)
    check_grads(
        lambda t, w: weighted_gather(t, jnp.asarray(slots), w),
        arguments,
        order=1,
        modes=["rev"],
        atol=1e-2,
        rtol=1e-2,
    )


def test_gather_keeps_dtypes_and_sums_in_float32():
    table, slots, weights = draw()
    many = np.full((1, 300), 1)  # more columns than are written out
    row = jnp.asarray(table, jnp.bfloat16)
    y = weighted_gather(row, jnp.asarray(many), jnp.full((1, 300), 1 / 300, jnp.float32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y[0], row[1])
    gradient = jax.grad(
        lambda t, w: weighted_gather(t, jnp.asarray(slots), w).astype(jnp.float32).sum(), (0, 1)
    )(row, jnp.asarray(weights, jnp.bfloat16))
    assert [g.dtype for g in gradient] == [jnp.bfloat16, jnp.bfloat16]


_programs = {
    (form, rows): jax.jit(lambda s, w, d, form=form, rows=rows: form(s, w, d, num_rows=rows))
    for form in FORMS
    for rows in (6, 500)
}


@settings(max_examples=30)
@given(
    shape=st.sampled_from([(1, 1, 1), (3, 5, 2), (50, 7, 4)]),
    rows=st.sampled_from([6, 500]),
    spread=st.sampled_from([1, 3, 500]),
    seed=st.integers(0, 2**16),
)
def test_both_forms_of_the_table_gradient(shape, rows, spread, seed):
    """Runs of one pair, runs over many chunks, everything on one row, pairs of no row."""
    M, K, D = shape
    rng = np.random.default_rng(seed)
    slots = rng.integers(-1, min(rows, spread), (M, K)).astype(np.int32)
    weights, dy = (rng.standard_normal(s).astype(np.float32) for s in ((M, K), (M, D)))
    want = oracle.table_gradient(slots, weights, dy, rows)
    for form in FORMS:
        ours = _programs[form, rows](slots, weights, dy)
        oracle.close(ours, want, 1e-6)
        np.testing.assert_array_equal(ours, _programs[form, rows](slots, weights, dy))


@pytest.mark.parametrize("form", FORMS)
def test_a_sum_feels_no_row_but_its_own(form):
    """Sums restart: what is added to one row leaves every other as it was, to the bit."""
    rng = np.random.default_rng(3)
    slots = np.sort(rng.integers(0, 9, (40, 5)), axis=None).reshape(40, 5).astype(np.int32)
    dy = rng.standard_normal((40, 3)).astype(np.float32)
    weights = rng.standard_normal((40, 5)).astype(np.float32)
    run = jax.jit(lambda w: form(jnp.asarray(slots), w, jnp.asarray(dy), num_rows=9))
    quiet = np.asarray(run(weights))
    for loudness in (1e30, np.inf):
        loud = np.asarray(run(np.where(slots == 4, loudness, weights)))
        assert not (np.abs(loud[4]) < 1e25).any()
        np.testing.assert_array_equal(np.delete(loud, 4, 0), np.delete(quiet, 4, 0))


def test_sorted_runs_adds_each_row_in_the_order_of_its_pairs():
    """Within a chunk the sum is that of float32 additions one after another."""
    rng = np.random.default_rng(4)
    slots = rng.integers(0, 3, (5, 6)).astype(np.int32)  # 30 pairs: one chunk
    weights, dy = (rng.standard_normal(s).astype(np.float32) for s in ((5, 6), (5, 2)))
    want = np.zeros((3, 2), np.float32)
    for m, k in np.ndindex(5, 6):
        want[slots[m, k]] += weights[m, k] * dy[m]
    ours = bag_gradient.sorted_runs(*map(jnp.asarray, (slots, weights, dy)), num_rows=3)
    np.testing.assert_allclose(ours, want, rtol=1e-6, atol=1e-6)


def test_neither_gradient_forms_the_rows_of_all_pairs():
    M, K, N, D = 512, 32, 64, 32
    arguments = (
        jax.ShapeDtypeStruct((M, K), jnp.int32),
        jax.ShapeDtypeStruct((M, K), jnp.float32),
        jax.ShapeDtypeStruct((M, D), jnp.float32),
    )
    table = jax.ShapeDtypeStruct((N, D), jnp.float32)
    for function, example in (
        (lambda s, w, d: bag_gradient.scatter(s, w, d, num_rows=N), arguments),
        (lambda s, w, d: bag_gradient.sorted_runs(s, w, d, num_rows=N), arguments),
        (bag_gradient.weights_gradient, (table, arguments[0], arguments[2])),
        (weighted_gather, (table, *arguments[:2])),
    ):
        memory = jax.jit(function).lower(*example).compile().memory_analysis()
        assert memory is not None and memory.temp_size_in_bytes < M * K * D * 4 / 2


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_table_that_all_devices_share_gets_the_gradient_of_all(check_vma):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    rng = np.random.default_rng(5)
    slots = rng.integers(0, 6, (16, 3)).astype(np.int32)
    table, weights, dy = (
        rng.standard_normal(s).astype(np.float32) for s in ((6, 4), (16, 3), (16, 4))
    )
    gather = jax.shard_map(
        weighted_gather,
        mesh=Mesh(np.array(jax.devices()[:8]), ("data",)),
        in_specs=(P(), P("data"), P("data")),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    y, pull = jax.vjp(lambda t, w: gather(t, slots, w), table, weights)
    d_table, d_weights = pull(dy)
    oracle.close(y, oracle.bag(table, slots, weights), 1e-6)
    oracle.close(d_table, oracle.table_gradient(slots, weights, dy, 6), 1e-6)
    oracle.close(d_weights, np.einsum("md,mkd->mk", dy, table[slots]), 1e-6)
