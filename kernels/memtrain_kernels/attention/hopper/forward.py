"""The forward kernel: Pallas Mosaic GPU for sm_90a.

A thread block owns 128 queries of one head: two warpgroups compute, 64 rows each, and a third one
streams keys and values by TMA. The two take turns at the tensor cores: while one is in its softmax,
the other multiplies (FlashAttention-3, arXiv 2407.08608).
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
    product,
    row_tokens,
    rows_of,
    slot_of,
    zeros,
)
from memtrain_kernels.attention.hopper.plan import (
    ROWS,
    Blocks,
    Plan,
    Tables,
    read_summary,
)
from memtrain_kernels.attention.hopper.schedule import live, visit


def forward(
    plan: Plan,
    blocks: Blocks,
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    tables: Tables,
) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, D] in q's dtype and lse [B, H, T] in float32, of padded arrays."""
    dtype = q_BTHD.dtype
    kernel = plgpu.kernel(
        functools.partial(_body, plan, blocks),
        out_type=(
            jax.ShapeDtypeStruct(q_BTHD.shape, dtype),
            jax.ShapeDtypeStruct((plan.B, plan.H, plan.T), jnp.float32),
        ),
        scratch_types={
            "q_smem": plgpu.SMEM((2, ROWS, plan.D), dtype),
            "k_smem": plgpu.SMEM((blocks.stages, blocks.block_kv, plan.D), dtype),
            "v_smem": plgpu.SMEM((blocks.stages_v, blocks.block_kv, plan.D), dtype),
            "kv_smem": plgpu.SMEM((blocks.stages, 3, blocks.block_kv), jnp.int32),
            "lse_smem": plgpu.SMEM((2, ROWS), jnp.float32),
            "q_full": plgpu.Barrier(num_barriers=2),
            "k_full": plgpu.Barrier(num_arrivals=2, num_barriers=blocks.stages),
            "v_full": plgpu.Barrier(num_barriers=blocks.stages_v),
            "k_free": plgpu.Barrier(num_arrivals=2, num_barriers=blocks.stages),
            "v_free": plgpu.Barrier(num_arrivals=2, num_barriers=blocks.stages_v),
            "turn": plgpu.Barrier(num_arrivals=2),
        },
        grid=(plan.B, plan.H, plan.T // blocks.block_q),
        grid_names=("batch", "head", "block"),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="attention_forward",
        compiler_params=compiler_params(),
    )
    return kernel(q_BTHD, k_BSKD, v_BSKD, *tables)


def _body(
    plan: Plan,
    blocks: Blocks,
    q_ref,
    k_ref,
    v_ref,
    own_ref,
    other_ref,
    walks_ref,
    o_ref,
    lse_ref,
    *,
    q_smem,
    k_smem,
    v_smem,
    kv_smem,
    lse_smem,
    q_full,
    k_full,
    v_full,
    k_free,
    v_free,
    turn,
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
            plgpu.barrier_wait(k_free.at[slot])
            plgpu.copy_gmem_to_smem(k_ref.at[b, rows, kv_head], k_smem.at[slot], k_full.at[slot])
            plgpu.copy_gmem_to_smem(other_ref.at[tokens_b, j], kv_smem.at[slot], k_full.at[slot])
            plgpu.barrier_wait(v_free.at[slot_v])
            plgpu.copy_gmem_to_smem(
                v_ref.at[b, rows, kv_head], v_smem.at[slot_v], v_full.at[slot_v]
            )
            return n + 1

        def is_live(j: jax.Array) -> jax.Array:
            return live(spec, q_summary, read_summary(other_ref, tokens_b, j))

        visit(spec, walk, is_live, load, jnp.int32(0))

    @pl.when(warpgroup < 2)
    def _compute() -> None:
        plgpu.set_max_registers(blocks.registers, action="increase")
        rows = pl.ds(i * blocks.block_q + warpgroup * ROWS, ROWS)
        q_rows = q_smem.at[warpgroup]
        free_all(k_free, blocks.stages)
        free_all(v_free, blocks.stages_v)
        plgpu.copy_gmem_to_smem(q_ref.at[b, rows, h], q_rows, q_full.at[warpgroup])
        q_pos, q_seg = row_tokens(own_ref, tokens_b, i, warpgroup)
        plgpu.barrier_wait(q_full.at[warpgroup])

        # The two pass the tensor cores to each other: the second starts a turn late, the first
        # ends one early, and both take two turns a tile, so every arrival finds its partner.
        def take_turns() -> None:
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        pl.when(warpgroup == 1)(take_turns)

        def step(n, carry):
            acc, softmax = carry
            slot, slot_v = slot_of(n, blocks.stages), slot_of(n, blocks.stages_v)
            plgpu.barrier_wait(k_full.at[slot])
            kv_tokens = kv_smem.at[slot]
            partial = is_partial(spec, q_summary, kv_tokens, own_is_q=True)
            products = product(
                q_rows, k_smem.at[slot].transpose((1, 0)), blocks.block_kv, take_turns
            )
            raw = scoring.raw(products)
            raw = mask_keys(spec, partial, raw, q_pos, q_seg, kv_tokens)
            plgpu.barrier_arrive(k_free.at[slot])
            softmax, p, fade = tile.absorb(softmax, raw, scoring.factor)
            acc = acc * tile.across(fade, acc.shape, 0)
            p = p.astype(q_ref.dtype)
            acc, softmax, p = lax.optimization_barrier((acc, softmax, p))
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_full.at[slot_v])
            plgpu.barrier_wait(turn)
            acc = add_product(acc, p, v_smem.at[slot_v])
            plgpu.barrier_arrive(v_free.at[slot_v])
            return acc, softmax

        start = tile.Softmax(rows_of(-jnp.inf), rows_of(0.0))
        acc, softmax = lax.fori_loop(0, walk.count, step, (zeros(ROWS, plan.D), start))
        pl.when(warpgroup == 0)(take_turns)

        weight, lse = tile.finish(softmax)
        q_rows[...] = (acc * tile.across(weight, acc.shape, 0)).astype(q_ref.dtype)
        lse_smem[warpgroup] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_rows, o_ref.at[b, rows, h])
        plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_ref.at[b, h, rows])
        plgpu.wait_smem_to_gmem(0)
