"""The kernels as one differentiable function: layouts, ranges, and what the gradient keeps."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from memtrain_kernels.attention.delta import delta_of
from memtrain_kernels.attention.masks import fill_defaults
from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.attention.tpu import backward, forward, tables, tile
from memtrain_kernels.attention.tpu.block_sizes import Blocks, blocks_for, chip
from memtrain_kernels.varying import vary_alike


class Tokens(NamedTuple):
    """Positions and segments, int32 [B or 1, T or S]."""

    q_pos: jax.Array
    kv_pos: jax.Array
    q_seg: jax.Array
    kv_seg: jax.Array


class Plan(NamedTuple):
    """What one call is compiled for. by_default: positions are 0, 1, 2, ... on both sides. wide:
    gradients are float32 and not rounded to the inputs' dtype."""

    spec: AttentionSpec
    forward: Blocks
    backward: Blocks
    by_default: bool
    interpret: Any
    wide: bool = False


def attend(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKE: jax.Array,
    q_pos: jax.Array | None,
    kv_pos: jax.Array | None,
    q_seg: jax.Array | None,
    kv_seg: jax.Array | None,
    spec: AttentionSpec,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, E] and lse [B, T, H] in float32; as tpu.attend, which checks the arguments."""
    plan = _plan_of(q_BTHD, k_BSKD, q_pos is None and kv_pos is None, spec, interpret)
    tokens = fill_defaults(q_BTHD.shape[1], k_BSKD.shape[1], q_pos, kv_pos, q_seg, kv_seg)
    q, k, v, *tokens = vary_alike(q_BTHD, k_BSKD, v_BSKE, *tokens)
    return _compiled(q, k, v, Tokens(*tokens), plan)


def gradients(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKE: jax.Array,
    q_pos: jax.Array | None,
    kv_pos: jax.Array | None,
    q_seg: jax.Array | None,
    kv_seg: jax.Array | None,
    spec: AttentionSpec,
    do_BTHE: jax.Array,
    lse_BTH: jax.Array,
    delta_BTH: jax.Array,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What these keys add to dq, dk and dv, in float32; as xla.gradients."""
    plan = _plan_of(q_BTHD, k_BSKD, q_pos is None and kv_pos is None, spec, interpret)
    plan = plan._replace(wide=True)
    tokens = fill_defaults(q_BTHD.shape[1], k_BSKD.shape[1], q_pos, kv_pos, q_seg, kv_seg)
    arrays = vary_alike(q_BTHD, k_BSKD, v_BSKE, do_BTHE, lse_BTH, delta_BTH, *tokens)
    return _compiled_gradients(*arrays[:3], Tokens(*arrays[6:]), *arrays[3:6], plan)


def _plan_of(q_BTHD, k_BSKD, by_default: bool, spec: AttentionSpec, interpret: Any) -> Plan:
    _, T, _, D = q_BTHD.shape
    blocks = blocks_for(spec, D, T, k_BSKD.shape[1], chip())
    return Plan(spec, *blocks, by_default, interpret)


# One program even where the caller compiles nothing: a grid's bound is computed on the device.
@functools.partial(jax.jit, static_argnums=(4,))
def _compiled(q, k, v, tokens: Tokens, plan: Plan):
    return _attend(q, k, v, tokens, plan)


@functools.partial(jax.jit, static_argnums=(7,))
def _compiled_gradients(q, k, v, tokens: Tokens, do, lse, delta, plan: Plan):
    return _gradients(q, k, v, tokens, do, lse, delta, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, tokens: Tokens, plan: Plan):
    return _results(q, k, v, tokens, plan)


def _attend_forward(q, k, v, tokens: Tokens, plan: Plan):
    o, lse = _results(q, k, v, tokens, plan)
    # The gradient reads o for one sum a row: rounded as the inputs are, it is half the memory.
    return (o, lse), (q, k, v, tokens, o.astype(q.dtype), lse)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _results(q_BTHD, k_BSKD, v_BSKE, tokens: Tokens, plan: Plan):
    B, T = q_BTHD.shape[:2]
    spec, blocks = plan.spec, plan.forward
    q = tables.make_side(tokens.q_pos, tokens.q_seg, B, blocks.q)
    kv = tables.make_side(tokens.kv_pos, tokens.kv_seg, B, blocks.kv)
    k_RKsD, v_RKsE = (tables.to_rows(x, blocks.kv) for x in (k_BSKD, v_BSKE))

    def call(table, steps, q_RHtD, q_tokens, q_summary):
        return forward.forward(
            q_RHtD,
            k_RKsD,
            v_RKsE,
            q_tokens,
            q_summary,
            kv,
            table,
            steps,
            spec,
            interpret=plan.interpret,
            cost=_cost(plan, q_BTHD, v_BSKE, products=(1, 1)),
        )

    o_RHtE, lse_RH1t = tables.in_chunks(
        call,
        tables.ranges(spec, q.blocks, kv.blocks, of_queries=True),
        (tables.to_rows(q_BTHD, blocks.q), q.tokens, q.summary),
    )
    o_BTHE = tables.from_rows(o_RHtE, B, T)
    return o_BTHE, tables.from_rows(lse_RH1t.swapaxes(2, 3), B, T)[..., 0]


def _attend_backward(plan: Plan, residuals, cotangents):
    *arrays, tokens, o, lse = residuals
    do, dlse = cotangents
    dq, dk, dv = _gradients(*arrays, tokens, do, lse, delta_of(o, lse, do, dlse), plan)
    no_gradient = tuple(np.zeros(x.shape, jax.dtypes.float0) for x in tokens)
    return dq, dk, dv, Tokens(*no_gradient)  # pyright: ignore[reportArgumentType]


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(7,))
def _gradients(q_BTHD, k_BSKD, v_BSKE, tokens: Tokens, do_BTHE, lse_BTH, delta_BTH, plan: Plan):
    B, T = q_BTHD.shape[:2]
    S = k_BSKD.shape[1]
    spec, blocks = plan.spec, plan.backward
    dtype = jnp.float32 if plan.wide else q_BTHD.dtype
    lse_BTH = jnp.where(lse_BTH > -jnp.inf, lse_BTH, 0) * tile.LOG2_E
    q = tables.make_side(tokens.q_pos, tokens.q_seg, B, blocks.q)
    kv = tables.make_side(tokens.kv_pos, tokens.kv_seg, B, blocks.kv)
    k_RKsD, v_RKsE = (tables.to_rows(x, blocks.kv) for x in (k_BSKD, v_BSKE))
    queries = backward.Queries(
        tables.to_rows(q_BTHD, blocks.q),
        tables.to_rows(do_BTHE.astype(q_BTHD.dtype), blocks.q),
        tables.to_rows(lse_BTH[..., None], blocks.q).swapaxes(2, 3),
        tables.to_rows(delta_BTH[..., None], blocks.q).swapaxes(2, 3),
    )

    def dq_call(table, steps, queries, q_tokens, q_summary):
        return backward.query_gradient(
            queries,
            k_RKsD,
            v_RKsE,
            q_tokens,
            q_summary,
            kv,
            table,
            steps,
            spec,
            dtype=dtype,
            interpret=plan.interpret,
            cost=_cost(plan, q_BTHD, v_BSKE, products=(2, 1)),
        )

    dq_RHtD = tables.in_chunks(
        dq_call,
        tables.ranges(spec, q.blocks, kv.blocks, of_queries=True),
        (queries, q.tokens, q.summary),
    )

    def dkv_call(table, steps, k_RKsD, v_RKsE, kv_tokens, kv_summary):
        return backward.key_gradients(
            queries,
            k_RKsD,
            v_RKsE,
            q,
            kv_tokens,
            kv_summary,
            table,
            steps,
            spec,
            dtype=dtype,
            interpret=plan.interpret,
            cost=_cost(plan, q_BTHD, v_BSKE, products=(2, 2)),
        )

    dk_RKsD, dv_RKsE = _by_parts(
        dkv_call,
        tables.ranges(spec, q.blocks, kv.blocks, of_queries=False),
        (k_RKsD, v_RKsE, kv.tokens, kv.summary),
        B,
        head=_head_blocks(plan, S, blocks.kv),
    )
    return (
        tables.from_rows(dq_RHtD, B, T),
        tables.from_rows(dk_RKsD, B, S),
        tables.from_rows(dv_RKsE, B, S),
    )


@_results.defjvp
@_gradients.defjvp
def _no_second_derivative(plan, primals, tangents):
    raise NotImplementedError(
        "attention backend 'tpu' has a first derivative only: use backend='reference' for higher"
    )


def _head_blocks(plan: Plan, S: int, block: int) -> int:
    """How many first key blocks hold sinks or a prefix outside the window; 0 if it is not known.

    Nearly every query visits those, few visit another: in one grid, each key block would step
    through as many query blocks as the busiest.
    """
    spec = plan.spec
    head = -(-max(spec.sink_tokens, spec.prefix) // block)
    return head if plan.by_default and spec.window_left and head < -(-S // block) else 0


def _by_parts(call, table: jax.Array, rows: tuple, batch: int, head: int):
    """in_chunks over the first `head` blocks of every batch entry, then over the rest."""
    if not head:
        return tables.in_chunks(call, table, rows)

    def part(cut: slice):
        def take(x):
            x = x.reshape(batch, -1, *x.shape[1:])[:, cut]
            return x.reshape(-1, *x.shape[2:])

        return tables.in_chunks(call, take(table), jax.tree.map(take, rows))

    def join(a, b):
        a, b = (x.reshape(batch, -1, *x.shape[1:]) for x in (a, b))
        x = jnp.concatenate([a, b], axis=1)
        return x.reshape(-1, *x.shape[2:])

    return jax.tree.map(join, part(slice(None, head)), part(slice(head, None)))


def _cost(plan: Plan, q_BTHD, v_BSKE, products: tuple[int, int]) -> pl.CostEstimate:
    """What the scheduler is told: `products` of head_dim's and of value_dim's width a pair."""
    B, T, H, D = q_BTHD.shape
    _, S, K, E = v_BSKE.shape
    spec = plan.spec
    right = 1 if spec.causal else spec.window_right
    left = spec.window_left
    if left is not None and right is not None:
        pairs = T * min(S, left + right - 1)
    else:
        pairs = T * S if left is None and right is None else T * S // 2
    size = q_BTHD.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * B * H * pairs * (products[0] * D + products[1] * E),
        transcendentals=B * H * pairs,
        bytes_accessed=B * (T * H + S * K) * (D + E) * size * sum(products) // 2,
    )
