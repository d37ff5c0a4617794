"""The decode kernel: Pallas Mosaic GPU for sm_90a.

A thread block, one warpgroup, takes the queries of one key head against one split of a row. The
products are turned round, scores = K Q^T and output = V^T P^T: tokens, of which there are plenty,
are the 64 rows of a matrix instruction and queries its columns, so that 8 heads on one key head
cost 8 columns and not 64 padded rows, and 8-bit keys go from registers into the product. Pages come
by TMA, several tiles under way; page numbers are read from the block table a tile's time ahead.

Split over the KV length: Flash-Decoding (Dao et al. 2023).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memtrain_kernels.attention.hopper.tile import across
from memtrain_kernels.decode.hopper import tile
from memtrain_kernels.decode.hopper.plan import TILE, Plan
from memtrain_kernels.decode.hopper.schedule import (
    Run,
    is_full,
    is_ragged,
    page_numbers,
    page_scales,
    page_slot,
    quotient,
    read_run,
)
from memtrain_kernels.decode.paging import Pages


_LAYOUT = plgpu.Layout.WGMMA
_BY_TOKEN = plgpu.Layout.WGMMA.reduce(1)
_BY_QUERY = plgpu.Layout.WGMMA.reduce(0)
# Each thread holds four neighbours, which 8-bit loads and conversions want.
_LAYOUT_8_BIT = plgpu.Layout.WGMMA_UPCAST_2X
_TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED


def partials(
    plan: Plan,
    q_BCND: jax.Array,
    factors_BCN: jax.Array | None,
    pages: Pages,
    runs_BZ8: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """o [Z, B, C, E, N] and lse [Z, B, C, N] of every split, float32; C chunks of queries, which
    are in score_dtype and were divided by factors."""
    page_dtype = plan.page_dtype
    Z, B, C, N = plan.splits, plan.B, plan.K * plan.chunks, plan.columns
    shared = {
        "q_smem": plgpu.SMEM((N, plan.D), plan.score_dtype),
        "p_smem": plgpu.SMEM((N, TILE), plan.value_dtype),
        "lse_smem": plgpu.SMEM((N,), jnp.float32),
        "v_smem": plgpu.SMEM((plan.stages, TILE, plan.E), page_dtype),
        # Keys are no longer needed when the output is written.
        "k_and_o_smem": plgpu.RefUnion(
            plgpu.SMEM((plan.stages, TILE, plan.D), page_dtype),
            plgpu.SMEM((plan.E, N), jnp.float32),
        ),
        "q_full": plgpu.Barrier(),
        "k_full": plgpu.Barrier(num_arrivals=plan.pages_per_tile, num_barriers=plan.stages),
        "v_full": plgpu.Barrier(num_arrivals=plan.pages_per_tile, num_barriers=plan.stages),
    }
    if plan.quantized:
        shared["wide_smem"] = plgpu.SMEM((TILE, plan.E), plan.value_dtype)
    kernel = plgpu.kernel(
        functools.partial(_body, plan),
        out_type=(
            jax.ShapeDtypeStruct((Z, B, C, plan.E, N), jnp.float32),
            jax.ShapeDtypeStruct((Z, B, C, N), jnp.float32),
        ),
        scratch_types=shared,
        # Key heads, whose tokens lie side by side in a page, are worked on at the same time.
        grid=(B, Z, C),
        grid_names=("row", "split", "chunk"),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="decode_attention",
        # exp2 and log2 by instruction: relative error 2^-22.
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    arrays = (q_BCND, pages.k_PSKD, pages.v_PSKE, pages.tables_BM, runs_BZ8)
    some = (pages.k_scales, pages.v_scales, factors_BCN)
    return kernel(*arrays, *(x for x in some if x is not None))


def _body(
    plan: Plan,
    q_ref,
    k_ref,
    v_ref,
    tables_ref,
    runs_ref,
    *refs,
    q_smem,
    p_smem,
    lse_smem,
    v_smem,
    k_and_o_smem,
    q_full,
    k_full,
    v_full,
    wide_smem=None,
) -> None:
    *numbers_refs, o_ref, lse_ref = refs
    k_smem, o_smem = k_and_o_smem
    scoring, N = plan.scoring, plan.columns
    b, z, chunk = (lax.axis_index(name) for name in ("row", "split", "chunk"))
    head = quotient(chunk, plan.chunks) if plan.chunks > 1 else chunk
    run = read_run(runs_ref, b, z)

    def pages_of(i) -> tuple[jax.Array, ...]:
        return page_numbers(plan, run, tables_ref, b, i)

    def scales_of(pages: tuple[jax.Array, ...]):
        return page_scales(plan, pages, head, *numbers_refs[:2])

    def load(pages_ref, slots_smem, full, i, pages: tuple[jax.Array, ...]) -> None:
        """Start the copies of a run's i-th tile, if there is one."""

        @pl.when(i < run.count)
        def _() -> None:
            slot, start = _slot(plan, i), page_slot(plan, run.first + i)
            for c, page in enumerate(pages):
                piece = pages_ref.at[page, pl.ds(start, plan.tokens_per_copy), head]
                rows = pl.ds(c * plan.tokens_per_copy, plan.tokens_per_copy)
                plgpu.copy_gmem_to_smem(piece, slots_smem.at[slot, rows], full.at[slot])

    load_keys = functools.partial(load, k_ref, k_smem, k_full)
    load_values = functools.partial(load, v_ref, v_smem, v_full)

    def step(i, carry):
        softmax, acc, ahead = carry
        t, slot = run.first + i, _slot(plan, i)
        k_scale, v_scale = ahead.scales
        soon = _Ahead(
            keys=pages_of(i + 1 + plan.stages),
            values=ahead.keys,
            scaled=pages_of(i + 2) if by_page else (),
            scales=scales_of(ahead.scaled),
        )
        plgpu.barrier_wait(k_full.at[slot])
        products = tile.times_factors(_products(plan, k_smem.at[slot], q_smem), factor_N)
        products = tile.scaled(plan, products, k_scale, _tokens)
        raw = _mask(plan, run, t, chunk, scoring.raw(products))
        softmax, p, fade = tile.absorb(softmax, raw, scoring.factor)
        # The greatest logit was found by all warps together: none of them reads this tile's keys
        # any more, nor the last tile's values and exponentials.
        load_keys(i + plan.stages, ahead.keys)
        pl.when(i > 0)(lambda: load_values(i - 1 + plan.stages, ahead.values))
        acc = acc * across(fade, acc.shape, 1)
        p = tile.scaled(plan, p, v_scale, _tokens).astype(plan.value_dtype)
        p_smem.transpose((1, 0))[...] = plgpu.layout_cast(p, _TRANSPOSED)
        plgpu.barrier_wait(v_full.at[slot])
        values = _clean_values(plan, run, t, v_smem.at[slot], wide_smem)
        plgpu.commit_smem()
        acc = _add_product(acc, values.transpose((1, 0)), p_smem.transpose((1, 0)))
        return softmax, acc, soon

    first = [pages_of(jnp.int32(i)) for i in range(plan.stages + 1)]
    by_page = "page" in (plan.k_scales, plan.v_scales)
    ahead = _Ahead(first[-1], first[-1], first[1] if by_page else (), scales_of(first[0]))
    plgpu.copy_gmem_to_smem(q_ref.at[b, chunk], q_smem, q_full)
    for i in range(plan.stages):
        load_keys(jnp.int32(i), first[i])
        load_values(jnp.int32(i), first[i])
    factor_N = None
    if plan.scales_queries:
        factor_N = plgpu.load(numbers_refs[2].at[b, chunk], layout=_BY_QUERY, optimized=False)
    plgpu.barrier_wait(q_full)
    nothing = tile.Softmax(
        plgpu.layout_cast(jnp.full((N,), -jnp.inf, jnp.float32), _BY_QUERY), _zeros(TILE, N)
    )
    start = (nothing, _zeros(plan.E, N), ahead)
    softmax, acc, _ = lax.fori_loop(0, run.count, step, start)

    # The sum over tokens is taken by all warps together: none of them reads keys any more.
    weight, lse = tile.finish(softmax)
    o_smem[...] = acc * across(weight, acc.shape, 1)
    lse_smem[...] = lse
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(o_smem, o_ref.at[z, b, chunk])
    plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[z, b, chunk])
    plgpu.wait_smem_to_gmem(0)


class _Ahead(NamedTuple):
    """What the i-th step finds read, for global memory is far away: the pages of the keys and of
    the values that it loads, of the next tile where scales are by page, and its own scales."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    scaled: tuple[jax.Array, ...]
    scales: tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]


def _slot(plan: Plan, i) -> jax.Array:
    """The buffer of a run's i-th tile."""
    return lax.rem(i, jnp.int32(plan.stages))


def _tokens(layout=_BY_TOKEN) -> jax.Array:
    """The numbers of a tile's tokens: 0 .. 63."""
    return plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=layout)


def _zeros(rows: int, columns: int) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), _LAYOUT)


def _load_wide(stored_smem, dtype: str) -> jax.Array:
    return tile.widen(plgpu.load(stored_smem, layout=_LAYOUT_8_BIT), dtype)


def _products(plan: Plan, k_smem, q_smem) -> jax.Array:
    """Keys times queries [X, N] in float32."""

    def multiply(acc_ref):
        if not plan.quantized:
            plgpu.wgmma(acc_ref, k_smem, q_smem.transpose((1, 0)))
            return acc_ref[...]
        for start in range(0, plan.D, plan.wide_dims):
            # What a product reads from registers stays there until it is done.
            if start:
                plgpu.wgmma_wait(0)
            dims = pl.ds(start, min(plan.wide_dims, plan.D))
            keys = _load_wide(k_smem.at[:, dims], plan.score_dtype)
            keys = plgpu.layout_cast(keys, _LAYOUT)
            plgpu.wgmma(acc_ref, keys, q_smem.at[:, dims].transpose((1, 0)))
        return acc_ref[...]

    acc = plgpu.WGMMAAccumulatorRef((TILE, plan.columns), jnp.float32)
    return pl.run_scoped(multiply, acc)


def _add_product(acc: jax.Array, a, b) -> Any:
    """acc + a @ b."""
    return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, a, b))(
        plgpu.WGMMAAccumulatorRef.init(acc)
    )


def _mask(plan: Plan, run: Run, t, chunk, raw_XN: jax.Array) -> jax.Array:
    def mask(raw_XN: jax.Array) -> jax.Array:
        column_N = plgpu.broadcasted_iota(jnp.int32, (plan.columns,), 0, layout=_BY_QUERY)
        if plan.chunks > 1:
            column_N = column_N + lax.rem(chunk, jnp.int32(plan.chunks)) * plan.columns
        return tile.mask(plan, run, t, raw_XN, _tokens(), column_N)

    return lax.cond(is_full(plan, run, t), lambda raw_XN: raw_XN, mask, raw_XN)


def _clean_values(plan: Plan, run: Run, t, v_smem, wide_smem) -> Any:
    """A tile's values in 16 bits, in shared memory, 0 beyond the row's last token: there may be
    anything, and 0 times NaN is NaN."""

    def clean(x_XE: jax.Array) -> jax.Array:
        token_X = _tokens() if not plan.quantized else _tokens(_LAYOUT_8_BIT.reduce(1))
        return tile.clean(run, t, x_XE, token_X)

    if not plan.quantized:

        @pl.when(is_ragged(run, t))
        def _() -> None:
            v_smem[...] = clean(plgpu.load(v_smem, layout=_LAYOUT))

        return v_smem
    for start in range(0, plan.E, plan.wide_dims):
        dims = pl.ds(start, min(plan.wide_dims, plan.E))
        values = _load_wide(v_smem.at[:, dims], plan.value_dtype)
        if plan.page_dtype != "int8":
            values = lax.cond(is_ragged(run, t), clean, lambda x_XE: x_XE, values)
        wide_smem.at[:, dims][...] = values
    return wide_smem
