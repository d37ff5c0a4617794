"""The arithmetic of one tile, shared by kernel and twin: rows are tokens, columns are queries.

Only operations that Mosaic GPU lowers are used here. Logits are to base 2.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memtrain_kernels.attention.hopper.tile import LN2, across, masked
from memtrain_kernels.decode.hopper.plan import TILE, Plan
from memtrain_kernels.decode.hopper.schedule import Run, key_positions, quotient


class Softmax(NamedTuple):
    """A softmax under way. m [N]: greatest logit of each query. totals [X, N]: exponentials, which
    are summed over tokens once, at the end: that takes an exchange between warps."""

    m: jax.Array
    totals: jax.Array


def mask(plan: Plan, run: Run, tile, raw_XN, token_X, column_N) -> jax.Array:
    """raw logits, -inf where a query does not see a token. token_X, column_N: 0, 1, ...

    column_N counts the queries of a key head: query t of its g-th head is column t * group + g.
    Columns beyond the last query are masked or not, nobody reads them.
    """
    kv_pos = key_positions(run, tile, token_X)
    kv_seg = jnp.where(kv_pos < run.length, jnp.int32(0), jnp.int32(-1))
    q_pos = run.length - plan.T + quotient(column_N, plan.group)
    q_seg = jnp.where(q_pos >= 0, jnp.int32(0), jnp.int32(-1))
    return masked(plan.spec, raw_XN, q_pos, q_seg, kv_pos, kv_seg, axis=1)


def times_factors(products_XN: jax.Array, factor_N: jax.Array | None) -> jax.Array:
    """Products times the powers of two by which their queries were divided, if they were."""
    return products_XN if factor_N is None else products_XN * across(factor_N, products_XN.shape, 1)


def scaled(plan: Plan, x_XN: jax.Array, numbers, tokens) -> jax.Array:
    """x times one number, or the number of each token's page; x itself where there are none."""
    if len(numbers) < 2:
        return x_XN * numbers[0] if numbers else x_XN
    token_X = tokens()
    factor_X = jnp.full_like(token_X, 0, jnp.float32)
    for c, number in enumerate(numbers):
        factor_X = jnp.where(token_X >= c * plan.tokens_per_copy, number, factor_X)
    return x_XN * across(factor_X, x_XN.shape, 0)


def clean(run: Run, tile, v_XE: jax.Array, token_X) -> jax.Array:
    """Values, 0 beyond the row's last token: there may be anything, and 0 times NaN is NaN."""
    held_X = tile * TILE + token_X < run.length - run.gap
    return jnp.where(across(held_X, v_XE.shape, 0), v_XE, jnp.zeros_like(v_XE))


def absorb(softmax: Softmax, raw_XN, factor: float) -> tuple[Softmax, jax.Array, jax.Array]:
    """Take in one more tile: the softmax, the tile's exponentials, and how much old sums fade."""
    m = jnp.maximum(softmax.m, jnp.max(raw_XN, axis=0) * factor)
    # -inf - -inf is no number: a query that has seen nothing yet is shifted by 0.
    shift = jnp.where(m == -jnp.inf, 0.0, m)
    fade = jnp.exp2(softmax.m - shift)
    p = jnp.exp2(raw_XN * factor - across(shift, raw_XN.shape, 1))
    return Softmax(m, softmax.totals * across(fade, raw_XN.shape, 1) + p), p, fade


def finish(softmax: Softmax) -> tuple[jax.Array, jax.Array]:
    """What to multiply the sum of values by, and the natural log-sum-exp; 1 and -inf for a query
    that saw nothing."""
    # The greatest logit adds exp2(0) = 1, so a total < 1 says that nothing was seen; m is -inf.
    total = jnp.maximum(jnp.sum(softmax.totals, axis=0), 1.0)
    return 1 / total, (softmax.m + jnp.log2(total)) * LN2


def widen(stored: jax.Array, dtype: str) -> jax.Array:
    """8-bit numbers in a 16-bit dtype, all exactly, by the conversions that the chip has."""
    if stored.dtype == jnp.int8:
        wide = stored.astype(jnp.bfloat16)
        return wide if dtype == "bfloat16" else wide.astype(dtype)
    wide = stored.astype(jnp.float16)
    return wide if dtype == "float16" else wide.astype(jnp.float32).astype(dtype)
