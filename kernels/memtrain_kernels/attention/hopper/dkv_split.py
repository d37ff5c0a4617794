"""The gradients of keys and values for head_dim 256: Pallas Mosaic GPU for sm_90a.

One warpgroup has no registers for the sums of both dK and dV (256 of 255). So a thread block owns
64 keys and its two computing warpgroups divide the work by output: the first recomputes the
probabilities and sums dV, the second sums dK. The probabilities go from one to the other through
shared memory, in float32; no product is computed twice. The queries of every query head of the
group are streamed, one head after the other, in a fixed order.
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
    LAYOUT,
    add_product,
    column_numbers,
    compiler_params,
    free_all,
    is_partial,
    mask_queries,
    own_walk,
    product,
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
            "kv_smem": plgpu.SMEM((2, ROWS, plan.D), dtype),
            "p_smem": plgpu.SMEM((ROWS, blocks.block_q), jnp.float32),
            "q_smem": plgpu.SMEM((blocks.stages, blocks.block_q, plan.D), dtype),
            "do_smem": plgpu.SMEM((blocks.stages_v, blocks.block_q, plan.D), dtype),
            "tokens_smem": plgpu.SMEM((blocks.stages, 3, blocks.block_q), jnp.int32),
            "lse2_smem": plgpu.SMEM((blocks.stages, blocks.block_q), jnp.float32),
            "delta_smem": plgpu.SMEM((blocks.stages_v, blocks.block_q), jnp.float32),
            "kv_full": plgpu.Barrier(num_barriers=2),
            "q_full": plgpu.Barrier(num_arrivals=3, num_barriers=blocks.stages),
            "do_full": plgpu.Barrier(num_arrivals=2, num_barriers=blocks.stages_v),
            "p_full": plgpu.Barrier(),
            "p_free": plgpu.Barrier(),
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
    kv_smem,
    p_smem,
    q_smem,
    do_smem,
    tokens_smem,
    lse2_smem,
    delta_smem,
    kv_full,
    q_full,
    do_full,
    p_full,
    p_free,
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
    rows = pl.ds(j * blocks.block_kv, blocks.block_kv)
    steps = walk.count * plan.group
    k_rows, v_rows = kv_smem.at[0], kv_smem.at[1]

    @pl.when(warpgroup == 2)
    def _load() -> None:
        plgpu.set_max_registers(blocks.memory_registers, action="decrease")

        def load(h: jax.Array, i: jax.Array, n: jax.Array) -> None:
            slot, slot_do = slot_of(n, blocks.stages), slot_of(n, blocks.stages_v)
            q_rows = pl.ds(i * blocks.block_q, blocks.block_q)
            full, full_do = q_full.at[slot], do_full.at[slot_do]
            plgpu.barrier_wait(q_free.at[slot])
            plgpu.copy_gmem_to_smem(q_ref.at[b, q_rows, h], q_smem.at[slot], full)
            plgpu.copy_gmem_to_smem(other_ref.at[tokens_b, i], tokens_smem.at[slot], full)
            plgpu.copy_gmem_to_smem(lse2_ref.at[b, h, q_rows], lse2_smem.at[slot], full)
            plgpu.barrier_wait(do_free.at[slot_do])
            plgpu.copy_gmem_to_smem(do_ref.at[b, q_rows, h], do_smem.at[slot_do], full_do)
            plgpu.copy_gmem_to_smem(delta_ref.at[b, h, q_rows], delta_smem.at[slot_do], full_do)

        stream_queries(plan, walk, kv_summary, other_ref, tokens_b, head, load)

    @pl.when(warpgroup == 0)
    def _sum_dv() -> None:
        plgpu.set_max_registers(blocks.registers, action="increase")
        free_all(q_free, blocks.stages)
        free_all(do_free, blocks.stages_v)
        plgpu.copy_gmem_to_smem(k_ref.at[b, rows, head], k_rows, kv_full.at[0])
        kv_pos, kv_seg = row_tokens(own_ref, tokens_b, j, 0)
        plgpu.barrier_wait(kv_full.at[0])

        def step(n, dv):
            slot, slot_do = slot_of(n, blocks.stages), slot_of(n, blocks.stages_v)
            tokens = tokens_smem.at[slot]
            plgpu.barrier_wait(q_full.at[slot])
            partial = is_partial(spec, kv_summary, tokens, own_is_q=False)
            zero = tokens[SUMMARY, ZEROS]
            q_block = q_smem.at[slot].transpose((1, 0))
            raw = scoring.raw(product(kv_smem.at[zero], q_block, blocks.block_q))
            raw = mask_queries(spec, partial, raw, kv_pos, kv_seg, tokens)
            p = tile.probabilities(raw, scoring.factor, column_numbers(lse2_smem.at[slot]), axis=1)
            plgpu.barrier_arrive(q_free.at[slot])
            plgpu.barrier_wait(p_free)
            p_smem[...] = scoring.sloped(p, raw)
            plgpu.barrier_arrive(p_full)
            plgpu.barrier_wait(do_full.at[slot_do])
            dv = add_product(dv, p.astype(dtype), do_smem.at[slot_do])
            plgpu.barrier_arrive(do_free.at[slot_do])
            return dv

        dv = lax.fori_loop(0, steps, step, zeros(ROWS, plan.D))
        # Into the operand that this warpgroup alone was reading.
        k_rows[...] = dv.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_rows, dv_ref.at[b, rows, head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 1)
    def _sum_dk() -> None:
        plgpu.set_max_registers(blocks.registers, action="increase")
        plgpu.barrier_arrive(p_free)
        free_all(q_free, blocks.stages)
        free_all(do_free, blocks.stages_v)
        plgpu.copy_gmem_to_smem(v_ref.at[b, rows, head], v_rows, kv_full.at[1])
        plgpu.barrier_wait(kv_full.at[1])

        def step(n, dk):
            slot, slot_do = slot_of(n, blocks.stages), slot_of(n, blocks.stages_v)
            plgpu.barrier_wait(do_full.at[slot_do])
            do_block = do_smem.at[slot_do].transpose((1, 0))
            dp = product(v_rows, do_block, blocks.block_q)
            delta = column_numbers(delta_smem.at[slot_do])
            plgpu.barrier_wait(p_full)
            p = plgpu.load(p_smem, layout=LAYOUT)
            ds = tile.logit_gradient(p, dp, delta, axis=1).astype(dtype)
            plgpu.barrier_arrive(p_free)
            plgpu.barrier_arrive(do_free.at[slot_do])
            plgpu.barrier_wait(q_full.at[slot])
            dk = add_product(dk, ds, q_smem.at[slot])
            plgpu.barrier_arrive(q_free.at[slot])
            return dk

        dk = lax.fori_loop(0, steps, step, zeros(ROWS, plan.D))
        v_rows[...] = (dk * scoring.scale).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(v_rows, dk_ref.at[b, rows, head])
        plgpu.wait_smem_to_gmem(0)
