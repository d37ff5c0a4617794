"""Rotary phases against integers: no float takes part in the oracle until the last division."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory_oracles import rotate

from memtrain.memory.rope import apply_rope, rope_phases


BITS = 160
POSITIONS = [0, 1, 2, 12_345, 2**16 - 1, 2**16, 10**6, 2**24 + 1, 2**30 + 7, 2**31 - 1]


def pi_fixed(bits: int) -> int:
    """pi * 2^bits by Machin's formula."""

    def arctan_of_inverse(n: int) -> int:
        total, term, k = 0, (1 << bits + 16) // n, 1
        while term:
            total += term // k if k % 4 == 1 else -(term // k)
            term //= n * n
            k += 2
        return total

    return 4 * (4 * arctan_of_inverse(5) - arctan_of_inverse(239)) >> 16


def integer_root(value: int, degree: int) -> int:
    """floor(value ** (1 / degree)), by bisection."""
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**degree <= value else (low, middle)
    return low


def exact_phase(position: int, i: int, half_dim: int, theta: int) -> float:
    """position * theta^(-i / half_dim), in [-pi, pi)."""
    common = math.gcd(i, half_dim)
    numerator, degree = i // common, half_dim // common
    frequency = integer_root((1 << BITS * degree) // theta**numerator, degree)
    pi = pi_fixed(BITS)
    angle = (position * frequency + pi) % (2 * pi) - pi
    return angle / (1 << BITS)


@pytest.mark.parametrize(("half_dim", "theta"), [(4, 10_000), (32, 500_000)])
def test_phases_are_exact_up_to_the_largest_int32(half_dim, theta):
    got = rope_phases(jnp.asarray([POSITIONS], jnp.int32), half_dim, theta)[0]
    want = np.array(
        [[exact_phase(p, i, half_dim, theta) for i in range(half_dim)] for p in POSITIONS]
    )
    # On the circle: pi and -pi are one angle. Float32 next to pi is spaced 2.4e-7.
    error = np.abs((np.asarray(got, np.float64) - want + np.pi) % (2 * np.pi) - np.pi)
    assert error.max() < 4e-7


def test_the_oracle_is_the_plain_formula_at_small_positions():
    for position in (0, 1, 7, 100):
        for i in range(4):
            angle = position * 10_000 ** (-i / 4)
            assert math.cos(exact_phase(position, i, 4, 10_000)) == pytest.approx(math.cos(angle))


def test_float32_products_would_fail_here():
    position, i = 10**6 + 3, 1
    naive = np.float32(position) * np.float32(10_000 ** (-i / 4))
    want = exact_phase(position, i, 4, 10_000)
    error = abs((float(naive) - want + math.pi) % (2 * math.pi) - math.pi)
    assert error > 1e-3


def test_rotation_turns_pairs_of_features():
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 8))
    positions = [0, 5, 1000]
    got = apply_rope(jnp.asarray(x, jnp.float32), jnp.asarray([positions]), 10_000.0)
    want = np.stack([rotate(x[0, t], p, 10_000.0) for t, p in enumerate(positions)])
    np.testing.assert_allclose(got[0], want, atol=2e-6)


def test_scores_depend_on_distance_alone():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def score(q_position: int, k_position: int) -> float:
        turn = lambda x, p: apply_rope(jnp.asarray(x), jnp.asarray([[p]], jnp.int32), 1e4)  # noqa: E731
        return float(jnp.vdot(turn(q, q_position), turn(k, k_position)))

    for far in (10**6, 2**31 - 100):
        assert score(far + 9, far) == pytest.approx(score(9, 0), abs=2e-6)


def test_dtype_stays_and_arithmetic_is_float32():
    x = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
    y = apply_rope(x, jnp.asarray([[3]]), 10_000.0)
    assert y.dtype == jnp.bfloat16
    exact = apply_rope(x.astype(jnp.float32), jnp.asarray([[3]]), 10_000.0)
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))
    with jax.enable_x64(False):
        assert rope_phases(jnp.asarray([[3]]), 2, 10_000.0).dtype == jnp.float32
