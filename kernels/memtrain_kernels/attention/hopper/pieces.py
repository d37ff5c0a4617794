"""What the kernels have in common: registers, layouts, masking by tokens in shared memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memtrain_kernels.attention.hopper import tile
from memtrain_kernels.attention.hopper.plan import (
    POS,
    ROWS,
    SEG,
    SUMMARY,
    Plan,
    read_summary,
    read_walk,
)
from memtrain_kernels.attention.hopper.schedule import Summary, Walk, full, live, visit
from memtrain_kernels.attention.spec import AttentionSpec


LAYOUT = plgpu.Layout.WGMMA
ALONG_ROWS = plgpu.Layout.WGMMA.reduce(1)
ALONG_COLUMNS = plgpu.Layout.WGMMA.reduce(0)


def compiler_params() -> plgpu.CompilerParams:
    # approx_math is exp2 and log2 by instruction: relative error 2^-22.
    return plgpu.CompilerParams(approx_math=True)


def own_walk(walks_ref, b, n) -> Walk:
    """The walk of this thread block."""
    # Inside shard_map what is read varies over mesh axes, and what is computed from it does not:
    # the sum makes it of one kind, as loops demand.
    return Walk(*(number + 0 for number in read_walk(walks_ref, b, n)))


def block_from_longest(num_blocks: int) -> jax.Array:
    """The block this thread block owns: the last first, which under causal have most to do."""
    return num_blocks - 1 - lax.axis_index("block")


def slot_of(n: jax.Array, stages: int) -> jax.Array:
    """The buffer of the n-th tile."""
    return lax.rem(n, jnp.int32(stages)) if stages > 1 else jnp.int32(0)


def zeros(rows: int, columns: int) -> jax.Array:
    """An accumulator."""
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), LAYOUT)


def rows_of(value: float) -> jax.Array:
    """One number a row."""
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), ALONG_ROWS)


def product(a, b, columns: int, after_issue: Callable[[], None] | None = None) -> jax.Array:
    """a @ b in float32, `after_issue` run while it is under way."""

    def multiply(acc_ref):
        plgpu.wgmma(acc_ref, a, b)
        if after_issue is not None:
            after_issue()
        return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, columns), jnp.float32))


def product_pair(
    first: Callable[[], tuple[Any, Any]],
    second: Callable[[], tuple[Any, Any]],
    columns: int,
    meanwhile: Callable[[jax.Array], Any],
    overlap: bool,
) -> Any:
    """meanwhile(a @ b) of the first pair, run while the second is under way, and the second's.

    With overlap=False one after the other: fewer registers are held at once.
    """
    if not overlap:
        result = meanwhile(product(*first(), columns))
        return result, product(*second(), columns)

    def multiply(acc_ref, acc2_ref):
        plgpu.wgmma(acc_ref, *first())
        plgpu.wgmma(acc2_ref, *second())
        result = meanwhile(plgpu.wgmma_accumulator_load(acc_ref, wait_n=1))
        return result, acc2_ref[...]

    acc = plgpu.WGMMAAccumulatorRef((ROWS, columns), jnp.float32)
    return pl.run_scoped(multiply, acc, acc)


def add_product(acc: jax.Array, a, b) -> Any:
    """acc + a @ b."""
    return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, a, b))(
        plgpu.WGMMAAccumulatorRef.init(acc)
    )


def add_products(add: Callable[..., None], *accs: jax.Array) -> Any:
    """Accumulators after `add`, which gets their refs: its products are under way together."""
    return pl.run_state(lambda refs: add(*refs))(
        tuple(plgpu.WGMMAAccumulatorRef.init(acc) for acc in accs)
    )


def free_all(barriers, stages: int) -> None:
    """Tell the loading warpgroup that every buffer is free."""
    for s in range(stages):
        plgpu.barrier_arrive(barriers.at[s])


def row_numbers(numbers_ref) -> jax.Array:
    """One number a row, from global memory."""
    return plgpu.load(numbers_ref, layout=ALONG_ROWS, optimized=False)


def token_row(tokens_ref, which: int, layout) -> jax.Array:
    """Positions (POS) or segments (SEG) of a block in shared memory."""
    return plgpu.load(tokens_ref.at[which], layout=layout)


def row_tokens(own_ref, b, i, warpgroup) -> tuple[jax.Array, jax.Array]:
    """Positions and segments of a warpgroup's own rows, from global memory."""
    rows = pl.ds(warpgroup * ROWS, ROWS)
    return (
        plgpu.load(own_ref.at[b, i, POS, rows], layout=ALONG_ROWS, optimized=False),
        plgpu.load(own_ref.at[b, i, SEG, rows], layout=ALONG_ROWS, optimized=False),
    )


def is_partial(spec: AttentionSpec, own: Summary, tokens_ref, own_is_q: bool) -> jax.Array:
    """Whether the tile of own rows and the block in shared memory must be masked."""
    other = Summary(*(tokens_ref[SUMMARY, i] for i in range(len(Summary._fields))))
    q, kv = (own, other) if own_is_q else (other, own)
    return ~full(spec, q, kv)


def mask_keys(spec, partial, raw, q_pos, q_seg, tokens_ref) -> jax.Array:
    """raw logits of a tile whose columns are keys, -inf where they are not visible."""

    def mask(raw: jax.Array) -> jax.Array:
        kv_pos = token_row(tokens_ref, POS, ALONG_COLUMNS)
        kv_seg = token_row(tokens_ref, SEG, ALONG_COLUMNS)
        return tile.masked(spec, raw, q_pos, q_seg, kv_pos, kv_seg, axis=0)

    return lax.cond(partial, mask, lambda raw: raw, raw)


def column_numbers(numbers_ref) -> jax.Array:
    """One number a column, from shared memory."""
    return plgpu.load(numbers_ref, layout=ALONG_COLUMNS)


def mask_queries(spec, partial, raw, kv_pos, kv_seg, tokens_ref) -> jax.Array:
    """raw logits of a tile whose columns are queries, -inf where they see nothing of the rows."""

    def mask(raw: jax.Array) -> jax.Array:
        q_pos = token_row(tokens_ref, POS, ALONG_COLUMNS)
        q_seg = token_row(tokens_ref, SEG, ALONG_COLUMNS)
        return tile.masked(spec, raw, q_pos, q_seg, kv_pos, kv_seg, axis=1)

    return lax.cond(partial, mask, lambda raw: raw, raw)


def stream_queries(plan: Plan, walk: Walk, kv: Summary, other_ref, b, kv_head, load) -> None:
    """Run load(query head, query block, n) over a key block's tiles, head by head of its group."""

    def of_head(g: jax.Array, n: jax.Array) -> jax.Array:
        def tile_of_head(i: jax.Array, n: jax.Array) -> jax.Array:
            load(kv_head * plan.group + g, i, n)
            return n + 1

        def is_live(i: jax.Array) -> jax.Array:
            return live(plan.spec, read_summary(other_ref, b, i), kv)

        return visit(plan.spec, walk, is_live, tile_of_head, n)

    lax.fori_loop(0, plan.group, of_head, jnp.int32(0))
