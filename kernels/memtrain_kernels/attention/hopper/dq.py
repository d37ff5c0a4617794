"""The gradient of queries: Pallas Mosaic GPU for sm_90a.

A thread block owns 128 queries of one head, two computing warpgroups of 64 rows; keys and values
are streamed. Sums run in the order of the walk: the result is the same at every run.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memtrain_kernels.attention.hopper import tile
from memtrain_kernels.attention.hopper.pieces import (
    add_product,
    block_from_longest,
    compiler_params,
    free_all,
    is_partial,
    mask_keys,
    own_walk,
    product_pair,
    row_numbers,
    row_tokens,
    slot_of,
    zeros,
)
from memtrain_kernels.attention.hopper.plan import (
    ROWS,
    SUMMARY,
    ZEROS,
    Blocks,
    Plan,
    Tables,
    read_summary,
)
from memtrain_kernels.attention.hopper.schedule import live, visit


def dq(
    plan: Plan,
    blocks: Blocks,
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    do_BTHD: jax.Array,
    lse2_BHT: jax.Array,
    delta_BHT: jax.Array,
    tables: Tables,
) -> jax.Array:
    """dq [B, T, H, D] of padded arrays; lse2 to base 2, +inf where a query saw nothing."""
    dtype = q_BTHD.dtype
    kernel = plgpu.kernel(
        functools.partial(_body, plan, blocks),
        out_type=jax.ShapeDtypeStruct(q_BTHD.shape, dtype),
        scratch_types={
            "q_smem": plgpu.SMEM((2, ROWS, plan.D), dtype),
            "do_smem": plgpu.SMEM((2, ROWS, plan.D), dtype),
            "k_smem": plgpu.SMEM((blocks.stages, blocks.block_kv, plan.D), dtype),
            "v_smem": plgpu.SMEM((blocks.stages_v, blocks.block_kv, plan.D), dtype),
            "kv_smem": plgpu.SMEM((blocks.stages, 3, blocks.block_kv), jnp.int32),
            "q_full": plgpu.Barrier(num_arrivals=2, num_barriers=2),
            "k_full": plgpu.Barrier(num_arrivals=2, num_barriers=blocks.stages),
            "v_full": plgpu.Barrier(num_barriers=blocks.stages_v),
            "k_free": plgpu.Barrier(num_arrivals=2, num_barriers=blocks.stages),
            "v_free": plgpu.Barrier(num_arrivals=2, num_barriers=blocks.stages_v),
        },
        grid=(plan.B, plan.H, plan.T // blocks.block_q),
        grid_names=("batch", "head", "block"),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="attention_dq",
        compiler_params=compiler_params(),
    )
    return kernel(q_BTHD, k_BSKD, v_BSKD, do_BTHD, lse2_BHT, delta_BHT, *tables)


def _body(
    plan: Plan,
    blocks: Blocks,
    q_ref,
    k_ref,
    v_ref,
    do_ref,
    lse2_ref,
    delta_ref,
    own_ref,
    other_ref,
    walks_ref,
    dq_ref,
    *,
    q_smem,
    do_smem,
    k_smem,
    v_smem,
    kv_smem,
    q_full,
    k_full,
    v_full,
    k_free,
    v_free,
) -> None:
    spec, scoring = plan.spec, plan.scoring
    warpgroup = lax.axis_index("warpgroup")
    b, h = lax.axis_index("batch"), lax.axis_index("head")
    tokens_b = b if plan.token_batch > 1 else 0
    i = block_from_longest(plan.T // blocks.block_q)
    walk = own_walk(walks_ref, tokens_b, i)
    q_summary = read_summary(own_ref, tokens_b, i)

    @pl.when(warpgroup == 2)
    def _load() -> None:
        plgpu.set_max_registers(blocks.memory_registers, action="decrease")
        kv_head = lax.div(h, jnp.int32(plan.group))

        def load(j: jax.Array, n: jax.Array) -> jax.Array:
            slot, slot_v = slot_of(n, blocks.stages), slot_of(n, blocks.stages_v)
            rows = pl.ds(j * blocks.block_kv, blocks.block_kv)
            full, full_v = k_full.at[slot], v_full.at[slot_v]
            plgpu.barrier_wait(k_free.at[slot])
            plgpu.copy_gmem_to_smem(k_ref.at[b, rows, kv_head], k_smem.at[slot], full)
            plgpu.copy_gmem_to_smem(other_ref.at[tokens_b, j], kv_smem.at[slot], full)
            plgpu.barrier_wait(v_free.at[slot_v])
            plgpu.copy_gmem_to_smem(v_ref.at[b, rows, kv_head], v_smem.at[slot_v], full_v)
            return n + 1

        def is_live(j: jax.Array) -> jax.Array:
            return live(spec, q_summary, read_summary(other_ref, tokens_b, j))

        visit(spec, walk, is_live, load, jnp.int32(0))

    @pl.when(warpgroup < 2)
    def _compute() -> None:
        plgpu.set_max_registers(blocks.registers, action="increase")
        rows = pl.ds(i * blocks.block_q + warpgroup * ROWS, ROWS)
        q_rows, do_rows = q_smem.at[warpgroup], do_smem.at[warpgroup]
        full = q_full.at[warpgroup]
        free_all(k_free, blocks.stages)
        free_all(v_free, blocks.stages_v)
        plgpu.copy_gmem_to_smem(q_ref.at[b, rows, h], q_rows, full)
        plgpu.copy_gmem_to_smem(do_ref.at[b, rows, h], do_rows, full)
        q_pos, q_seg = row_tokens(own_ref, tokens_b, i, warpgroup)
        lse2 = row_numbers(lse2_ref.at[b, h, rows])
        delta = row_numbers(delta_ref.at[b, h, rows])
        plgpu.barrier_wait(full)

        def step(n, acc):
            slot, slot_v = slot_of(n, blocks.stages), slot_of(n, blocks.stages_v)
            k_block, v_block = k_smem.at[slot], v_smem.at[slot_v]
            plgpu.barrier_wait(k_full.at[slot])
            partial = is_partial(spec, q_summary, kv_smem.at[slot], own_is_q=True)
            plgpu.barrier_wait(v_full.at[slot_v])

            def own(n: int) -> jax.Array:
                return warpgroup + kv_smem[slot, SUMMARY, ZEROS + n]

            def softmax(products):
                raw = scoring.raw(products)
                raw = mask_keys(spec, partial, raw, q_pos, q_seg, kv_smem.at[slot])
                return scoring.sloped(tile.probabilities(raw, scoring.factor, lse2, axis=0), raw)

            p, dp = product_pair(
                lambda: (q_smem.at[own(0)], k_block.transpose((1, 0))),
                lambda: (do_smem.at[own(1)], v_block.transpose((1, 0))),
                blocks.block_kv,
                softmax,
                overlap=plan.overlap,
            )
            plgpu.barrier_arrive(v_free.at[slot_v])
            ds = tile.logit_gradient(p, dp, delta, axis=0).astype(q_ref.dtype)
            acc = add_product(acc, ds, k_block)
            plgpu.barrier_arrive(k_free.at[slot])
            return acc

        acc = lax.fori_loop(0, walk.count, step, zeros(ROWS, plan.D))
        q_rows[...] = (acc * scoring.scale).astype(q_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_rows, dq_ref.at[b, rows, h])
        plgpu.wait_smem_to_gmem(0)
