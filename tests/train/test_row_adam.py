"""Lazy Adam of table rows against float64 in NumPy, and rounding by chance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memtrain.train.rounding import round_stochastically
from memtrain.train.row_adam import Now, RowAdam
from memtrain_kernels import NO_ROW, RowGradients


ROWS, WIDTH, STEPS = 12, 3, 6
RATES = [0.1, 0.05, 0.2, 0.1, 0.1, 0.03]


def gradients():
    """A dense gradient for each step; about half the rows have none."""
    rng = np.random.default_rng(3)
    found = rng.normal(size=(STEPS, ROWS, WIDTH))
    return np.where(rng.random((STEPS, ROWS, 1)) < 0.5, found, 0.0)


def by_hand(table, steps):
    """Each row an Adam of its own, which only counts the steps with a gradient."""
    table, b1, b2 = table.astype(np.float64), 0.9, 0.95
    mean, square = np.zeros_like(table), np.zeros_like(table)
    count = np.zeros(ROWS, int)
    for rate, step in zip(RATES, steps, strict=True):
        for row in range(ROWS):
            if not step[row].any():
                continue
            count[row] += 1
            mean[row] = b1 * mean[row] + (1 - b1) * step[row]
            square[row] = b2 * square[row] + (1 - b2) * step[row] ** 2
            direction = mean[row] / (1 - b1 ** count[row])
            table[row] -= rate * direction / (np.sqrt(square[row] / (1 - b2 ** count[row])) + 1e-8)
    return table, mean, square, count


def now(step, *, good=True):
    return Now(jnp.float32(RATES[step]), jnp.int32(step), jnp.uint32(7), jnp.asarray(good))


def rows_of(step):
    """The same gradient as rows, with room for more and one row that was read to no effect."""
    ids = np.flatnonzero(step.any(-1) | (np.arange(ROWS) == 5))
    padded = np.full(ROWS + 2, NO_ROW, np.int32)
    padded[: len(ids)] = ids
    rows = np.zeros((ROWS + 2, WIDTH), np.float32)
    rows[: len(ids)] = step[ids]
    return RowGradients(jnp.asarray(padded), jnp.asarray(rows), jnp.int32(len(ids)))


# Of all rows, of one, and of four, of which the last begins among the rows of the one before.
BLOCKS = {"rows": 1 << 23, "row by row": WIDTH, "four rows at a time": 4 * WIDTH + 1}
HOST = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")


@pytest.mark.parametrize("of", [*BLOCKS, "four rows at a time, on the host", "table"])
def test_against_float64_and_untouched_rows_stand_still(of):
    table = np.random.default_rng(1).normal(size=(ROWS, WIDTH)).astype(np.float32)
    steps = gradients()
    adam = RowAdam(0.9, 0.95, 1e-8, block_numbers=BLOCKS.get(of.removesuffix(", on the host"), 1))
    at, moments = jnp.asarray(table), adam.init(jnp.asarray(table))
    if of.endswith("host"):
        at, moments = jax.device_put((at, moments), HOST)

    @jax.jit
    def update(at, moments, step, gradient):
        if of == "table":
            return adam.update_table(at, moments, gradient, step)
        return adam.update_rows(at, moments, gradient, step)

    for i, step in enumerate(steps):
        given = jnp.asarray(step, jnp.float32) if of == "table" else rows_of(step)
        after, new = update(at, moments, now(i), given)
        still = ~step.any(-1)
        assert still.any()
        for a, b in zip(jax.tree.leaves((after, new)), jax.tree.leaves((at, moments)), strict=True):
            np.testing.assert_array_equal(np.asarray(a)[still], np.asarray(b)[still])
        at, moments = after, new
    want, mean, square, count = by_hand(table, steps)
    np.testing.assert_allclose(at, want, atol=2e-6)
    np.testing.assert_allclose(moments.mean, mean, atol=1e-6)
    np.testing.assert_allclose(moments.square, square, atol=1e-6)
    np.testing.assert_array_equal(moments.updates, count)
    last = [max((i for i in range(STEPS) if steps[i, r].any()), default=-1) for r in range(ROWS)]
    np.testing.assert_array_equal(moments.last_step, last)
    skipped = update(at, moments, now(0, good=False), given)
    for a, b in zip(jax.tree.leaves(skipped), jax.tree.leaves((at, moments)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_where_every_row_has_a_gradient_it_is_adam():
    import optax

    rng = np.random.default_rng(2)
    table = jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.float32)
    adam, rival = RowAdam(0.9, 0.95, 1e-8), optax.adam(0.1, 0.9, 0.95, 1e-8)
    moments, state, theirs = adam.init(table), rival.init(table), table
    for _ in range(4):
        gradient = jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.float32)
        table, moments = adam.update_table(table, moments, gradient, now(0))
        updates, state = rival.update(gradient, state)
        theirs = optax.apply_updates(theirs, updates)
    np.testing.assert_allclose(table, theirs, atol=2e-6)


@pytest.mark.parametrize(
    ("rounding", "moves"), [("nearest", 0.0), ("stochastic", 1), ("master", 1)]
)
def test_updates_below_a_bfloat16_step(rounding, moves):
    """1,000 updates of 2**-14 from 1, where bfloat16 has steps of 2**-7: rounded to the nearest,
    every one is lost; by chance, or from a float32 copy, their sum arrives."""
    adam = RowAdam(0.0, 0.0, 0.0, rounding)
    table = jnp.ones((4, 64), jnp.bfloat16)
    moments = adam.init(table)
    gradient = jnp.full(table.shape, -1.0, jnp.float32)

    @jax.jit
    def go(table, moments):
        def step(i, both):
            at = Now(jnp.float32(2.0**-14), i, i.astype(jnp.uint32), jnp.asarray(True))
            return adam.update_table(*both, gradient, at)

        return jax.lax.fori_loop(0, 1000, step, (table, moments))

    after, _ = go(table, moments)
    assert after.dtype == jnp.bfloat16
    want = 1 + moves * 1000 * 2.0**-14
    # A sum of 1,000 roundings with a variance of at most 2**-7 * 2**-14 each, over 256 numbers.
    error = 5 * np.sqrt(1000 * 2.0**-21 / 256) if rounding == "stochastic" else 2.0**-8
    assert abs(np.mean(np.asarray(after, np.float64)) - want) < error


def test_rounding_by_chance_takes_neighbours_with_their_chances():
    x = jnp.asarray([[1.0, 1.0 + 2.0**-9, -(1.0 + 3 * 2.0**-9), 0.0, jnp.inf]], jnp.float32)
    ids = jnp.arange(4096)
    found = np.asarray(
        round_stochastically(jnp.tile(x, (4096, 1)), jnp.bfloat16, jnp.uint32(1), ids), np.float64
    )
    assert set(found[:, 0]) == {1.0} and set(found[:, 3]) == {0.0} and set(found[:, 4]) == {np.inf}
    assert set(found[:, 1]) == {1.0, 1.0 + 2.0**-7}
    assert abs(np.mean(found[:, 1] > 1) - 0.25) < 0.03
    assert abs(np.mean(found[:, 2] < -1) - 0.75) < 0.03
    part = round_stochastically(
        jnp.tile(x, (4096, 1))[1024:, 1:3], jnp.bfloat16, jnp.uint32(1), ids[1024:], 1
    )
    np.testing.assert_array_equal(np.asarray(part, np.float64), found[1024:, 1:3])
    with pytest.raises(ValueError, match="float16: give bfloat16 or float32"):
        round_stochastically(x, jnp.float16, jnp.uint32(1), ids[:1])
