"""The forward kernel: one block of queries of one head against the key blocks it may see."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.attention.tpu import tile
from memtrain_kernels.attention.tpu.block_sizes import LANES
from memtrain_kernels.attention.tpu.tables import WORDS, Side
from memtrain_kernels.attention.tpu.tile import MASKED, Scoring, dot, other_block, own_block, wide


def forward(
    q_RHtD: jax.Array,
    k_RKsD: jax.Array,
    v_RKsE: jax.Array,
    q_tokens: jax.Array,
    q_summary: jax.Array,
    kv: Side,
    table: jax.Array,
    steps: jax.Array,
    spec: AttentionSpec,
    *,
    interpret: Any,
    cost: pl.CostEstimate,
) -> tuple[jax.Array, jax.Array]:
    """o [R, H, t, E] and lse [R, H, 1, t], float32, for R rows of t queries.

    q_tokens [R, 2, t], q_summary [R, 1, 5] and the flat table [R * 4] as `tables` makes them;
    steps: the greatest number of visits. k and v have their own rows, of s keys.
    """
    R, H, t, D = q_RHtD.shape
    _, K, s, E = v_RKsE.shape
    group = H // K

    def kv_head(h):
        return h if group == 1 else jax.lax.div(h, group)

    def q_head(h):
        return h

    kernel = functools.partial(
        _kernel, spec=spec, scoring=Scoring(spec.scale_for(D), spec.soft_cap)
    )
    size = q_RHtD.dtype.itemsize
    row_bytes = (D + max(D, LANES) + 2 * max(E, LANES)) * size + (2 * max(E, LANES) + 3 * LANES) * 4
    o_RHtE, lse_RH1t = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(R, H, steps),
            in_specs=[
                own_block((1, 5), memory_space=pltpu.SMEM),
                other_block((1, 5), memory_space=pltpu.SMEM),
                own_block((2, t)),
                other_block((2, s)),
                own_block((t, D), q_head),
                other_block((s, D), kv_head),
                other_block((s, E), kv_head),
            ],
            out_specs=[own_block((t, E), q_head), own_block((1, t), q_head)],
            scratch_shapes=[
                pltpu.VMEM((2, t, LANES), jnp.int32),
                pltpu.VMEM((t, LANES), jnp.float32),
                pltpu.VMEM((t, LANES), jnp.float32),
                pltpu.VMEM((t, E), jnp.float32),
            ],
        ),
        out_shape=[
            tile.result((R, H, t, E), jnp.float32, q_RHtD),
            tile.result((R, H, 1, t), jnp.float32, q_RHtD),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tile.vmem_bytes(t, s, row_bytes, tiles=4),
        ),
        cost_estimate=cost,
        interpret=interpret,
        name="attention_forward",
    )(table, q_summary, kv.summary, q_tokens, kv.tokens, q_RHtD, k_RKsD, v_RKsE)
    return o_RHtE, lse_RH1t


def _kernel(
    table,
    q_summary,
    kv_summary,
    q_tokens,
    kv_tokens,
    q_tD,
    k_sD,
    v_sE,
    o_tE,
    lse_1t,
    columns,
    m_tL,
    l_tL,
    acc_tE,
    *,
    spec: AttentionSpec,
    scoring: Scoring,
):
    own, step = pl.program_id(0), pl.program_id(2)

    @pl.when(step == 0)
    def _start():
        tile.set_columns(columns, q_tokens)
        m_tL[...] = jnp.full_like(m_tL, MASKED)
        l_tL[...] = jnp.zeros_like(l_tL)
        acc_tE[...] = jnp.zeros_like(acc_tE)

    def visit(masked: bool):
        raw_ts = dot(q_tD[...], k_sD[...], transpose_b=True)
        s_ts, _ = tile.scores(raw_ts, scoring)
        if masked:
            s_ts = tile.hidden(s_ts, spec, columns, kv_tokens, columns_are_queries=True)
        m_old, m_new = m_tL[...], jnp.maximum(m_tL[...], jnp.max(s_ts, axis=1)[:, None])
        # Where a row has seen nothing yet, this is 1 everywhere: the first real maximum wipes it
        # out, and if none comes, the end does.
        p_ts = jnp.exp2(s_ts - wide(m_new, s_ts.shape[1]))
        fade_tL = jnp.exp2(m_old - m_new)
        m_tL[...] = m_new
        l_tL[...] = fade_tL * l_tL[...] + jnp.sum(p_ts, axis=1)[:, None]
        o_new = dot(p_ts.astype(v_sE.dtype), v_sE[...])
        acc_tE[...] = wide(fade_tL, acc_tE.shape[1]) * acc_tE[...] + o_new

    tile.when_live(step < table[own * WORDS + 1], q_summary, kv_summary, spec, visit)

    @pl.when(step == pl.num_programs(2) - 1)
    def _end():
        seen_tL = m_tL[...] > 0.5 * MASKED
        sum_tL = jnp.where(seen_tL, l_tL[...], 1)
        inverse_tL = jnp.where(seen_tL, 1 / sum_tL, 0)
        o_tE[...] = acc_tE[...] * wide(inverse_tL, acc_tE.shape[1])
        lse_tL = jnp.where(seen_tL, (m_tL[...] + jnp.log2(sum_tL)) / tile.LOG2_E, -jnp.inf)
        lse_1t[...] = tile.row(lse_tL)
