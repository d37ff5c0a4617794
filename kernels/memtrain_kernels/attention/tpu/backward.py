"""The backward kernels, deterministic: dQ by blocks of queries, dK with dV by blocks of keys.

Both recompute the probabilities from the log-sum-exp. dK and dV work on transposed tiles, so that
the statistics of the queries lie along the lanes, as they do in memory; a block of keys meets every
query head of its group in turn, and so the group's sum needs neither atomics nor a second pass.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.attention.tpu import tile
from memtrain_kernels.attention.tpu.block_sizes import LANES
from memtrain_kernels.attention.tpu.tables import WORDS, Side
from memtrain_kernels.attention.tpu.tile import Scoring, dot, other_block, own_block, wide


class Queries(NamedTuple):
    """What the backward kernels read of R rows of t queries; statistics are float32 [R, H, 1, t].

    lse: in units of log 2, 0 where a query saw nothing. delta: rowsum(do * o) - dlse.
    """

    q: jax.Array
    do: jax.Array
    lse: jax.Array
    delta: jax.Array


def query_gradient(
    queries: Queries,
    k_RKsD: jax.Array,
    v_RKsE: jax.Array,
    q_tokens: jax.Array,
    q_summary: jax.Array,
    kv: Side,
    table: jax.Array,
    steps: jax.Array,
    spec: AttentionSpec,
    *,
    dtype: Any,
    interpret: Any,
    cost: pl.CostEstimate,
) -> jax.Array:
    """dQ [R, H, t, D] in `dtype`; the other arguments as in `forward`."""
    R, H, t, D = queries.q.shape
    _, K, s, E = v_RKsE.shape
    group = H // K

    def kv_head(h):
        return h if group == 1 else jax.lax.div(h, group)

    def q_head(h):
        return h

    kernel = functools.partial(
        _query_kernel, spec=spec, scoring=Scoring(spec.scale_for(D), spec.soft_cap)
    )
    return pl.pallas_call(
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
                own_block((t, E), q_head),
                own_block((1, t), q_head),
                own_block((1, t), q_head),
            ],
            out_specs=own_block((t, D), q_head),
            scratch_shapes=[
                pltpu.VMEM((2, t, LANES), jnp.int32),
                pltpu.VMEM((2, t, LANES), jnp.float32),
                pltpu.VMEM((t, D), jnp.float32),
            ],
        ),
        out_shape=tile.result(queries.q.shape, dtype, queries.q),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tile.vmem_bytes(t, s, _row_bytes(D, E, queries.q), tiles=6),
        ),
        cost_estimate=cost,
        interpret=interpret,
        name="attention_dq",
    )(
        table,
        q_summary,
        kv.summary,
        q_tokens,
        kv.tokens,
        queries.q,
        k_RKsD,
        v_RKsE,
        queries.do,
        queries.lse,
        queries.delta,
    )


def _query_kernel(
    table,
    q_summary,
    kv_summary,
    q_tokens,
    kv_tokens,
    q_tD,
    k_sD,
    v_sE,
    do_tE,
    lse_1t,
    delta_1t,
    dq_tD,
    columns,
    statistics,
    acc_tD,
    *,
    spec: AttentionSpec,
    scoring: Scoring,
):
    own, step = pl.program_id(0), pl.program_id(2)

    @pl.when(step == 0)
    def _start():
        tile.set_columns(columns, q_tokens)
        statistics[0] = tile.column(lse_1t[...])
        statistics[1] = tile.column(delta_1t[...])
        acc_tD[...] = jnp.zeros_like(acc_tD)

    def visit(masked: bool):
        raw_ts = dot(q_tD[...], k_sD[...], transpose_b=True)
        s_ts, slope_ts = tile.scores(raw_ts, scoring)
        if masked:
            s_ts = tile.hidden(s_ts, spec, columns, kv_tokens, columns_are_queries=True)
        p_ts = jnp.exp2(s_ts - wide(statistics[0], s_ts.shape[1]))
        dp_ts = dot(do_tE[...], v_sE[...], transpose_b=True)
        ds_ts = p_ts * (dp_ts - wide(statistics[1], s_ts.shape[1]))
        if slope_ts is not None:
            ds_ts *= slope_ts
        acc_tD[...] += dot(ds_ts.astype(k_sD.dtype), k_sD[...])

    tile.when_live(step < table[own * WORDS + 1], q_summary, kv_summary, spec, visit)

    @pl.when(step == pl.num_programs(2) - 1)
    def _end():
        dq_tD[...] = (acc_tD[...] * scoring.scale).astype(dq_tD.dtype)


def key_gradients(
    queries: Queries,
    k_RKsD: jax.Array,
    v_RKsE: jax.Array,
    q: Side,
    kv_tokens: jax.Array,
    kv_summary: jax.Array,
    table: jax.Array,
    steps: jax.Array,
    spec: AttentionSpec,
    *,
    dtype: Any,
    interpret: Any,
    cost: pl.CostEstimate,
) -> tuple[jax.Array, jax.Array]:
    """dK [R, K, s, D] and dV [R, K, s, E] in `dtype`, for R rows of s keys.

    kv_tokens [R, 2, s], kv_summary [R, 1, 5] and the table are of these rows; q is the other side.
    """
    R, K, s, E = v_RKsE.shape
    _, H, t, D = queries.q.shape
    group = H // K

    def kv_head(k, _):
        return k

    def q_head(k, g):
        return k * group + g

    kernel = functools.partial(
        _key_kernel, spec=spec, scoring=Scoring(spec.scale_for(D), spec.soft_cap)
    )
    dk_RKsD, dv_RKsE = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(R, K, group, steps),
            in_specs=[
                other_block((1, 5), memory_space=pltpu.SMEM),
                own_block((1, 5), memory_space=pltpu.SMEM),
                other_block((2, t)),
                own_block((2, s)),
                other_block((t, D), q_head),
                own_block((s, D), kv_head),
                own_block((s, E), kv_head),
                other_block((t, E), q_head),
                other_block((1, t), q_head),
                other_block((1, t), q_head),
            ],
            out_specs=[own_block((s, D), kv_head), own_block((s, E), kv_head)],
            scratch_shapes=[
                pltpu.VMEM((2, s, LANES), jnp.int32),
                pltpu.VMEM((s, D), jnp.float32),
                pltpu.VMEM((s, E), jnp.float32),
            ],
        ),
        out_shape=[
            tile.result(k_RKsD.shape, dtype, k_RKsD),
            tile.result(v_RKsE.shape, dtype, v_RKsE),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tile.vmem_bytes(t, s, _row_bytes(D, E, queries.q), tiles=6),
        ),
        cost_estimate=cost,
        interpret=interpret,
        name="attention_dkv",
    )(
        table,
        q.summary,
        kv_summary,
        q.tokens,
        kv_tokens,
        queries.q,
        k_RKsD,
        v_RKsE,
        queries.do,
        queries.lse,
        queries.delta,
    )
    return dk_RKsD, dv_RKsE


def _key_kernel(
    table,
    q_summary,
    kv_summary,
    q_tokens,
    kv_tokens,
    q_tD,
    k_sD,
    v_sE,
    do_tE,
    lse_1t,
    delta_1t,
    dk_sD,
    dv_sE,
    columns,
    dk_acc_sD,
    dv_acc_sE,
    *,
    spec: AttentionSpec,
    scoring: Scoring,
):
    own, member, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when((member == 0) & (step == 0))
    def _start():
        tile.set_columns(columns, kv_tokens)
        dk_acc_sD[...] = jnp.zeros_like(dk_acc_sD)
        dv_acc_sE[...] = jnp.zeros_like(dv_acc_sE)

    def visit(masked: bool):
        raw_st = dot(k_sD[...], q_tD[...], transpose_b=True)
        s_st, slope_st = tile.scores(raw_st, scoring)
        if masked:
            s_st = tile.hidden(s_st, spec, columns, q_tokens, columns_are_queries=False)
        p_st = jnp.exp2(s_st - lse_1t[...])
        dv_acc_sE[...] += dot(p_st.astype(do_tE.dtype), do_tE[...])
        dp_st = dot(v_sE[...], do_tE[...], transpose_b=True)
        ds_st = p_st * (dp_st - delta_1t[...])
        if slope_st is not None:
            ds_st *= slope_st
        dk_acc_sD[...] += dot(ds_st.astype(q_tD.dtype), q_tD[...])

    tile.when_live(step < table[own * WORDS + 1], q_summary, kv_summary, spec, visit)

    @pl.when((member == pl.num_programs(2) - 1) & (step == pl.num_programs(3) - 1))
    def _end():
        dk_sD[...] = (dk_acc_sD[...] * scoring.scale).astype(dk_sD.dtype)
        dv_sE[...] = dv_acc_sE[...].astype(dv_sE.dtype)


def _row_bytes(D: int, E: int, q: jax.Array) -> int:
    D, E = max(D, LANES), max(E, LANES)
    return 3 * (D + E) * q.dtype.itemsize + (D + E + 4 * LANES) * 4
