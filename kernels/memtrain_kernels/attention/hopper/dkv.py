"""The gradients of keys and values for head_dim 64 and 128: Pallas Mosaic GPU for sm_90a.

A thread block owns 128 keys of one key head, two computing warpgroups of 64 rows, which keep the
sums of dK and dV in registers; the queries of every query head of the group are streamed, one head
after the other, so grouped heads are summed here, in a fixed order and in float32.
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
    add_products,
    column_numbers,
    compiler_params,
    free_all,
    is_partial,
    mask_queries,
    own_walk,
    product_pair,
    row_tokens,
    slot_of,
    stream_queries,
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


def dkv(
    plan: Plan,
    blocks: Blocks,
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    do_BTHD: jax.Array,
    lse2_BHT: jax.Array,
    delta_BHT: jax.Array,
    tables: Tables,
) -> tuple[jax.Array, jax.Array]:
    """dk, dv [B, S, K, D] of padded arrays; lse2 to base 2, +inf where a query saw nothing."""
    dtype = q_BTHD.dtype
    out = jax.ShapeDtypeStruct(k_BSKD.shape, dtype)
    kernel = plgpu.kernel(
        functools.partial(_body, plan, blocks),
        out_type=(out, out),
        scratch_types={
            "k_smem": plgpu.SMEM((2, ROWS, plan.D), dtype),
            "v_smem": plgpu.SMEM((2, ROWS, plan.D), dtype),
            "q_smem": plgpu.SMEM((blocks.stages, blocks.block_q, plan.D), dtype),
            "do_smem": plgpu.SMEM((blocks.stages_v, blocks.block_q, plan.D), dtype),
            "tokens_smem": plgpu.SMEM((blocks.stages, 3, blocks.block_q), jnp.int32),
            "lse2_smem": plgpu.SMEM((blocks.stages, blocks.block_q), jnp.float32),
            "delta_smem": plgpu.SMEM((blocks.stages_v, blocks.block_q), jnp.float32),
            "kv_full": plgpu.Barrier(num_arrivals=2, num_barriers=2),
            "q_full": plgpu.Barrier(num_arrivals=3, num_barriers=blocks.stages),
            "do_full": plgpu.Barrier(num_arrivals=2, num_barriers=blocks.stages_v),
            "q_free": plgpu.Barrier(num_arrivals=2, num_barriers=blocks.stages),
            "do_free": plgpu.Barrier(num_arrivals=2, num_barriers=blocks.stages_v),
        },
        grid=(plan.B, plan.K, plan.S // blocks.block_kv),
        grid_names=("batch", "head", "block"),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="attention_dkv",
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
    dk_ref,
    dv_ref,
    *,
    k_smem,
    v_smem,
    q_smem,
    do_smem,
    tokens_smem,
    lse2_smem,
    delta_smem,
    kv_full,
    q_full,
    do_full,
    q_free,
    do_free,
) -> None:
    spec, scoring, dtype = plan.spec, plan.scoring, q_ref.dtype
    warpgroup = lax.axis_index("warpgroup")
    b, head = lax.axis_index("batch"), lax.axis_index("head")
    tokens_b = b if plan.token_batch > 1 else 0
    # Under causal the first keys are seen most: they start first.
    j = lax.axis_index("block")
    walk = own_walk(walks_ref, tokens_b, j)
    kv_summary = read_summary(own_ref, tokens_b, j)

    @pl.when(warpgroup == 2)
    def _load() -> None:
        plgpu.set_max_registers(blocks.memory_registers, action="decrease")

        def load(h: jax.Array, i: jax.Array, n: jax.Array) -> None:
            slot, slot_do = slot_of(n, blocks.stages), slot_of(n, blocks.stages_v)
            rows = pl.ds(i * blocks.block_q, blocks.block_q)
            full, full_do = q_full.at[slot], do_full.at[slot_do]
            plgpu.barrier_wait(q_free.at[slot])
            plgpu.copy_gmem_to_smem(q_ref.at[b, rows, h], q_smem.at[slot], full)
            plgpu.copy_gmem_to_smem(other_ref.at[tokens_b, i], tokens_smem.at[slot], full)
            plgpu.copy_gmem_to_smem(lse2_ref.at[b, h, rows], lse2_smem.at[slot], full)
            plgpu.barrier_wait(do_free.at[slot_do])
            plgpu.copy_gmem_to_smem(do_ref.at[b, rows, h], do_smem.at[slot_do], full_do)
            plgpu.copy_gmem_to_smem(delta_ref.at[b, h, rows], delta_smem.at[slot_do], full_do)

        stream_queries(plan, walk, kv_summary, other_ref, tokens_b, head, load)

    @pl.when(warpgroup < 2)
    def _compute() -> None:
        plgpu.set_max_registers(blocks.registers, action="increase")
        rows = pl.ds(j * blocks.block_kv + warpgroup * ROWS, ROWS)
        k_rows, v_rows = k_smem.at[warpgroup], v_smem.at[warpgroup]
        full = kv_full.at[warpgroup]
        free_all(q_free, blocks.stages)
        free_all(do_free, blocks.stages_v)
        plgpu.copy_gmem_to_smem(k_ref.at[b, rows, head], k_rows, full)
        plgpu.copy_gmem_to_smem(v_ref.at[b, rows, head], v_rows, full)
        kv_pos, kv_seg = row_tokens(own_ref, tokens_b, j, warpgroup)
        plgpu.barrier_wait(full)

        def step(n, carry):
            dk, dv = carry
            slot, slot_do = slot_of(n, blocks.stages), slot_of(n, blocks.stages_v)
            q_block, do_block = q_smem.at[slot], do_smem.at[slot_do]
            tokens = tokens_smem.at[slot]
            plgpu.barrier_wait(q_full.at[slot])
            partial = is_partial(spec, kv_summary, tokens, own_is_q=False)
            plgpu.barrier_wait(do_full.at[slot_do])

            def own(n: int) -> jax.Array:
                return warpgroup + tokens_smem[slot, SUMMARY, ZEROS + n]

            def softmax(products):
                raw = scoring.raw(products)
                raw = mask_queries(spec, partial, raw, kv_pos, kv_seg, tokens)
                lse2 = column_numbers(lse2_smem.at[slot])
                p = tile.probabilities(raw, scoring.factor, lse2, axis=1)
                return p.astype(dtype), scoring.sloped(p, raw)

            (p16, p), dp = product_pair(
                lambda: (k_smem.at[own(0)], q_block.transpose((1, 0))),
                lambda: (v_smem.at[own(1)], do_block.transpose((1, 0))),
                blocks.block_q,
                softmax,
                overlap=plan.overlap,
            )
            delta = column_numbers(delta_smem.at[slot_do])
            ds16 = tile.logit_gradient(p, dp, delta, axis=1).astype(dtype)

            def add(dk_ref, dv_ref):
                plgpu.wgmma(dv_ref, p16, do_block)
                plgpu.wgmma(dk_ref, ds16, q_block)

            dk, dv = add_products(add, dk, dv)
            plgpu.barrier_arrive(do_free.at[slot_do])
            plgpu.barrier_arrive(q_free.at[slot])
            return dk, dv

        nothing = zeros(ROWS, plan.D), zeros(ROWS, plan.D)
        dk, dv = lax.fori_loop(0, walk.count * plan.group, step, nothing)
        k_rows[...] = (dk * scoring.scale).astype(dtype)
        v_rows[...] = dv.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_rows, dk_ref.at[b, rows, head])
        plgpu.copy_smem_to_gmem(v_rows, dv_ref.at[b, rows, head])
        plgpu.wait_smem_to_gmem(0)
