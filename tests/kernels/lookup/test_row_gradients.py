"""The row form of the table gradient against NumPy in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import lookup_oracle as oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrain_kernels.lookup import (
    NO_ROW,
    RowGradients,
    bag_gradient,
    merge_row_gradients,
    weighted_gather,
    weighted_gather_row_gradients,
)


def draw(seed, M=50, K=7, D=4, spread=60):
    rng = np.random.default_rng(seed)
    slots = rng.integers(-1, spread, (M, K)).astype(np.int32)
    weights, dy = (rng.standard_normal(s).astype(np.float32) for s in ((M, K), (M, D)))
    return slots, weights, dy


@functools.cache
def program(form, max_rows=None):
    """weighted_gather_row_gradients by one form of the sums, whatever the device."""

    def run(slots, weights, dy):
        forced = lambda s, w, d, rows: form(s, w, d, num_rows=rows)  # noqa: E731
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("memtrain_kernels.lookup.row_gradients.sum_by_row", forced)
            return weighted_gather_row_gradients(slots, weights, dy, max_rows=max_rows)

    return jax.jit(run)


densify: Any = jax.jit(RowGradients.to_dense, static_argnums=1)


@settings(max_examples=15)
@given(
    shape=st.sampled_from([(1, 1, 1), (50, 7, 4)]),
    spread=st.sampled_from([1, 60, 400]),
    form=st.sampled_from([bag_gradient.scatter, bag_gradient.sorted_runs]),
    seed=st.integers(0, 2**16),
)
def test_ids_are_the_touched_rows_and_rows_their_sums(shape, spread, form, seed):
    slots, weights, dy = draw(seed, *shape, spread=spread)
    got = program(form)(slots, weights, dy)
    touched = np.unique(slots[slots >= 0])
    n = int(got.count)
    assert got.ids.shape == (slots.size,) and got.ids.dtype == jnp.int32 and n == len(touched)
    np.testing.assert_array_equal(got.ids[:n], touched)
    assert (np.asarray(got.ids[n:]) == NO_ROW).all() and not np.asarray(got.rows[n:]).any()
    want = oracle.table_gradient(slots, weights, dy, 400)
    oracle.close(got.rows[:n], want[touched], 1e-6)
    oracle.close(densify(got, 400), want, 1e-6)
    for one, two in zip(got, program(form)(slots, weights, dy), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("form", [bag_gradient.scatter, bag_gradient.sorted_runs])
def test_a_result_of_fewer_rows_holds_them_all_or_is_no_number(form):
    slots, weights, dy = draw(0, spread=20)
    whole = program(form)(slots, weights, dy)
    short = program(form, 20)(slots, weights, dy)
    assert short.ids.shape == (20,) and int(short.count) == 20
    np.testing.assert_array_equal(short.ids, whole.ids[:20])
    np.testing.assert_array_equal(short.rows, whole.rows[:20])
    lost = program(form, 19)(slots, weights, dy)
    assert int(lost.count) == 20 and np.isnan(lost.rows).all()
    merged = jax.jit(merge_row_gradients)(whole, lost)
    assert np.isnan(merged.rows).all()


def test_a_zero_tap_gives_the_rows_that_differentiating_the_table_gives():
    """The recipe of the docstring, through a layer on each side of the bag."""
    slots, _, _ = draw(1)
    rng = np.random.default_rng(2)
    table, mix = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((60, 4), (4, 4)))
    scores = jnp.asarray(rng.standard_normal(slots.shape), jnp.float32)

    def loss(table, scores, tap):
        y = weighted_gather(table, jnp.asarray(slots), jax.nn.softmax(scores)) + tap
        return jnp.sum(jnp.sin(y @ mix) ** 2)

    @jax.jit
    def dense(table, scores):
        return jax.grad(lambda t, s: loss(t, s, 0.0), (0, 1))(table, scores)

    @jax.jit
    def tapped(table, scores):
        frozen = jax.lax.stop_gradient(table)
        tap = jnp.zeros((slots.shape[0], 4))
        d_scores, dy = jax.grad(loss, (1, 2))(frozen, scores, tap)
        return weighted_gather_row_gradients(slots, jax.nn.softmax(scores), dy), d_scores

    d_table, d_scores = dense(table, scores)
    rows, d_scores_too = tapped(table, scores)
    oracle.close(rows.to_dense(60), np.asarray(d_table, np.float64), 1e-6)
    oracle.close(d_scores_too, np.asarray(d_scores, np.float64), 1e-6)
    assert np.abs(np.asarray(d_table)).max() > 0.1


def test_several_layers_of_one_table_merge_in_the_order_given():
    parts = [draw(seed, K=3) for seed in range(3)]
    rows_of = jax.jit(weighted_gather_row_gradients)
    rows = [rows_of(*part) for part in parts]
    want = sum(oracle.table_gradient(*part, 60) for part in parts)
    merge = jax.jit(lambda parts: merge_row_gradients(*parts, max_rows=60))
    merged = merge(rows)
    assert merged.ids.shape == (60,)
    n = int(merged.count)
    touched = np.flatnonzero(np.abs(want).sum(1))
    np.testing.assert_array_equal(merged.ids[:n], touched)
    oracle.close(densify(merged, 60), want, 1e-6)
    for one, two in zip(merged, merge(rows), strict=True):
        np.testing.assert_array_equal(one, two)
    # A row of one part alone is that part's, to the bit.
    alone = RowGradients(*rows[0])
    np.testing.assert_array_equal(jax.jit(merge_row_gradients)(alone).rows, alone.rows)


def test_rows_are_a_pytree_of_static_shape():
    rows = jax.eval_shape(
        lambda: weighted_gather_row_gradients(jnp.zeros((4, 2), int), jnp.ones((4, 2)),
                                              jnp.ones((4, 8), jnp.bfloat16))
    )  # fmt: skip
    assert isinstance(rows, RowGradients)
    assert [(x.shape, x.dtype) for x in rows] == [
        ((8,), jnp.int32),
        ((8, 8), jnp.float32),
        ((), jnp.int32),
    ]
