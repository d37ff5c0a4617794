"""Blockwise attention with its few tiles written out: training lengths, short prompts, decoding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from memtrain_kernels.attention import tiles
from memtrain_kernels.attention.blocks import Plan
from memtrain_kernels.attention.tiles import Rows, Running, Scaling, Tokens


def forward(
    plan: Plan,
    scaling: Scaling,
    q_BKRD: jax.Array,
    k_BKSD: jax.Array,
    v_BKSE: jax.Array,
    tokens: Tokens,
) -> tuple[jax.Array, jax.Array]:
    """o [B, K, R, E] and lse [B, K, R, 1]."""
    R = q_BKRD.shape[2]
    group = R // plan.T
    outs, lses = [], []
    for i in range(plan.num_q):
        lo, hi = plan.q_bounds(i)
        q = q_BKRD[:, :, lo * group : hi * group]
        (q,) = _after(outs[-1:], q)
        running: Running | None = None
        for a, b in _runs(plan, plan.kv_tiles(i)):
            k, v = k_BKSD[:, :, a:b], v_BKSE[:, :, a:b]
            s = tiles.masked_scores(plan.spec, scaling, q, k, _cut(tokens, lo, hi, a, b))
            running = tiles.start(s, v) if running is None else tiles.absorb(running, s, v)
        if running is None:
            running = tiles.nothing(q, v_BKSE.shape[-1])
        o, lse = tiles.finish(running)
        outs.append(o)
        lses.append(lse)
    return _join(outs, axis=2), _join(lses, axis=2)


def backward(
    plan: Plan,
    scaling: Scaling,
    rows: Rows,
    k_BKSD: jax.Array,
    v_BKSE: jax.Array,
    tokens: Tokens,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq [B, K, R, D], dk [B, K, D, S], dv [B, K, E, S], before the scales."""
    group = rows.q_BKRD.shape[2] // plan.T
    dqs: list[jax.Array] = []
    last: list[jax.Array] = []
    dks: list[jax.Array | None] = [None] * plan.num_kv
    dvs: list[jax.Array | None] = [None] * plan.num_kv
    for i in range(plan.num_q):
        lo, hi = plan.q_bounds(i)
        block = _cut_rows(rows, lo * group, hi * group)
        dq: jax.Array | None = None
        for j in plan.kv_tiles(i):
            a, b = plan.kv_bounds(j)
            k, v = k_BKSD[:, :, a:b], v_BKSE[:, :, a:b]
            cut = _cut(tokens, lo, hi, a, b)
            k, v = _after(last, k, v)
            dq_tile, dk, dv = tiles.tile_gradients(plan.spec, scaling, block, k, v, cut)
            last = [dk, dv]
            dq, dks[j], dvs[j] = _plus(dq, dq_tile), _plus(dks[j], dk), _plus(dvs[j], dv)
        if dq is None:
            dq = jnp.zeros(block.q_BKRD.shape, tiles.accumulation_dtype(block.q_BKRD.dtype))
        dqs.append(dq)
    dk_all = [_or_zeros(dk, k_BKSD, plan.kv_bounds(j)) for j, dk in enumerate(dks)]
    dv_all = [_or_zeros(dv, v_BKSE, plan.kv_bounds(j)) for j, dv in enumerate(dvs)]
    return _join(dqs, axis=2), _join(dk_all, axis=3), _join(dv_all, axis=3)


def _runs(plan: Plan, blocks: list[int]) -> list[tuple[int, int]]:
    """Token ranges of maximal runs of neighbouring kv blocks: one softmax tile each."""
    runs: list[tuple[int, int]] = []
    for j in blocks:
        a, b = plan.kv_bounds(j)
        if runs and runs[-1][1] == a:
            runs[-1] = (runs[-1][0], b)
        else:
            runs.append((a, b))
    return runs


def _cut(tokens: Tokens, lo: int, hi: int, a: int, b: int) -> Tokens:
    return Tokens(
        tokens.q_pos[:, lo:hi], tokens.kv_pos[:, a:b], tokens.q_seg[:, lo:hi], tokens.kv_seg[:, a:b]
    )


def _cut_rows(rows: Rows, lo: int, hi: int) -> Rows:
    return Rows(
        rows.q_BKRD[:, :, lo:hi],
        rows.q_BKDR[:, :, :, lo:hi],
        rows.do_BKRE[:, :, lo:hi],
        rows.do_BKER[:, :, :, lo:hi],
        rows.lse_BKR1[:, :, lo:hi],
        rows.delta_BKR1[:, :, lo:hi],
    )


def _after(done: list[jax.Array], *arrays: jax.Array) -> list[jax.Array]:
    """The arrays, but not before `done` is computed.

    XLA on CPU would start all blocks early and hold all their scores at once.
    """
    return lax.optimization_barrier((done, list(arrays)))[1] if done else list(arrays)


def _join(parts: list[jax.Array], axis: int) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis)


def _plus(total: jax.Array | None, part: jax.Array) -> jax.Array:
    return part if total is None else total + part


def _or_zeros(total: jax.Array | None, x_BKSD: jax.Array, bounds: tuple[int, int]) -> jax.Array:
    if total is not None:
        return total
    B, K, _, D = x_BKSD.shape
    a, b = bounds
    return jnp.zeros((B, K, D, b - a), tiles.accumulation_dtype(x_BKSD.dtype))
