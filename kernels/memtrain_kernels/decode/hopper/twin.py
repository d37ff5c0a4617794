"""The twin of the kernel: the same loop over the same tiles in plain jnp, on any device.

Mosaic GPU code with wgmma cannot be interpreted, so the twin shares with the kernel what can be
shared (the runs, the pages, full or masked, the arithmetic of a tile) and repeats the rest (the
order of sums, every rounding). Held to an oracle it proves the algorithm; memory traffic, barriers
and layouts it does not.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from memtrain_kernels.attention.hopper.tile import across
from memtrain_kernels.decode.hopper import tile
from memtrain_kernels.decode.hopper.plan import TILE, Plan
from memtrain_kernels.decode.hopper.schedule import (
    is_full,
    is_ragged,
    page_numbers,
    page_scales,
    page_slot,
    read_run,
)
from memtrain_kernels.decode.paging import Pages


def partials(
    plan: Plan,
    q_BCND: jax.Array,
    factors_BCN: jax.Array | None,
    pages: Pages,
    runs_BZ8: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """As kernel.partials: o [Z, B, C, E, N] and lse [Z, B, C, N]."""
    scoring, N = plan.scoring, plan.columns
    token_X = jnp.arange(TILE, dtype=jnp.int32)
    scales = [x for x in (pages.k_scales, pages.v_scales) if x is not None]

    def block(at: jax.Array) -> tuple[jax.Array, jax.Array]:
        z, b, chunk = at
        head = chunk // plan.chunks
        run = read_run(runs_BZ8, b, z)
        column_N = chunk % plan.chunks * N + jnp.arange(N, dtype=jnp.int32)
        q_ND = q_BCND[b, chunk]
        factor_N = None if factors_BCN is None else factors_BCN[b, chunk]

        def step(i, carry):
            softmax, acc = carry
            t = run.first + i
            numbers = page_numbers(plan, run, pages.tables_BM, b, i)
            k_scale, v_scale = page_scales(plan, numbers, head, *scales)
            keys = _load(plan, pages.k_PSKD, numbers, t, head)
            values = _load(plan, pages.v_PSKE, numbers, t, head)
            if plan.quantized:
                keys = tile.widen(keys, plan.score_dtype)
                values = tile.widen(values, plan.value_dtype)
            products = tile.times_factors(_dot(keys, q_ND.T), factor_N)
            products = tile.scaled(plan, products, k_scale, lambda: token_X)
            raw = scoring.raw(products)
            masked = tile.mask(plan, run, t, raw, token_X, column_N)
            raw = jnp.where(is_full(plan, run, t), raw, masked)
            softmax, p, fade = tile.absorb(softmax, raw, scoring.factor)
            acc = acc * across(fade, acc.shape, 1)
            p = tile.scaled(plan, p, v_scale, lambda: token_X).astype(plan.value_dtype)
            cleaned = tile.clean(run, t, values, token_X)
            values = jnp.where(is_ragged(run, t), cleaned, values)
            return softmax, acc + _dot(values.T, p)

        nothing = tile.Softmax(jnp.full((N,), -jnp.inf), jnp.zeros((TILE, N)))
        softmax, acc = lax.fori_loop(0, run.count, step, (nothing, jnp.zeros((plan.E, N))))
        weight, lse = tile.finish(softmax)
        return acc * across(weight, acc.shape, 1), lse

    sizes = (plan.splits, plan.B, plan.K * plan.chunks)
    grid = jnp.stack(jnp.meshgrid(*(jnp.arange(n) for n in sizes), indexing="ij"), axis=-1)
    out = lax.map(block, grid.reshape(-1, 3).astype(jnp.int32))
    return tuple(x.reshape(*sizes, *x.shape[1:]) for x in out)


def _load(plan: Plan, pages_PSKD: jax.Array, numbers, t, head) -> jax.Array:
    """A tile of one head, [64, D]: what the kernel's copies bring."""
    size = (1, plan.tokens_per_copy, 1, pages_PSKD.shape[3])
    slot = page_slot(plan, t)
    pieces = [lax.dynamic_slice(pages_PSKD, (page, slot, head, 0), size) for page in numbers]
    return jnp.concatenate([piece[0, :, 0] for piece in pieces])


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
