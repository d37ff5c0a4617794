"""One attention call around the kernels: padding, tables, and the rule for gradients.

Forward keeps only the log-sum-exp a row; backward recomputes the probabilities from it, as in
FlashAttention (arXiv 2205.14135). The cotangent of the log-sum-exp enters through delta.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from memtrain_kernels.attention.delta import delta_of
from memtrain_kernels.attention.hopper.plan import (
    DKV,
    DQ,
    FORWARD,
    Plan,
    Tokens,
    make_plan,
    make_tokens,
    pad,
    tables_of_keys,
    tables_of_queries,
)
from memtrain_kernels.attention.hopper.tile import LOG2E
from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.varying import vary_alike


Engine = Literal["kernels", "twins"]
"""What computes the tiles: the GPU kernels, or the same loops in plain jnp on any device."""


def attend_by(
    engine: Engine,
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    q_pos: jax.Array | None,
    kv_pos: jax.Array | None,
    q_seg: jax.Array | None,
    kv_seg: jax.Array | None,
    spec: AttentionSpec,
) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, D] and lse [B, T, H] in float32. Twins take float32 too, and any head_dim."""
    _check(q_BTHD, k_BSKD, v_BSKD, spec, engine)
    T, S = q_BTHD.shape[1], k_BSKD.shape[1]
    tokens = make_tokens(T, S, q_pos, kv_pos, q_seg, kv_seg)
    plan = make_plan(q_BTHD, k_BSKD, tokens.q_pos.shape[0], spec)
    q, k, v, *tokens = vary_alike(pad(q_BTHD), pad(k_BSKD), pad(v_BSKD), *tokens)
    o_BTHD, lse_BHT = _attend(q, k, v, Tokens(*tokens), plan, engine)
    return o_BTHD[:, :T].astype(jnp.float32), lse_BHT[:, :, :T].transpose(0, 2, 1)


def gradients_by(
    engine: Engine,
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    q_pos: jax.Array | None,
    kv_pos: jax.Array | None,
    q_seg: jax.Array | None,
    kv_seg: jax.Array | None,
    spec: AttentionSpec,
    do_BTHD: jax.Array,
    lse_BTH: jax.Array,
    delta_BTH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What these keys add to dq, dk and dv; as xla.gradients. The kernels round each to the inputs'
    dtype before it is returned as float32."""
    _check(q_BTHD, k_BSKD, v_BSKD, spec, engine)
    T, S = q_BTHD.shape[1], k_BSKD.shape[1]
    tokens = make_tokens(T, S, q_pos, kv_pos, q_seg, kv_seg)
    plan = make_plan(q_BTHD, k_BSKD, tokens.q_pos.shape[0], spec)
    lse_BHT = pad(lse_BTH.transpose(0, 2, 1), fill=-jnp.inf, axis=2)
    delta_BHT = pad(delta_BTH.transpose(0, 2, 1), axis=2)
    rows = pad(do_BTHD.astype(q_BTHD.dtype)), lse_BHT, delta_BHT
    arrays = vary_alike(pad(q_BTHD), pad(k_BSKD), pad(v_BSKD), *rows, *tokens)
    found = _gradients(*arrays[:3], Tokens(*arrays[6:]), *arrays[3:6], plan, engine)
    return tuple(  # pyright: ignore[reportReturnType]
        x[:, :length].astype(jnp.float32) for x, length in zip(found, (T, S, S), strict=True)
    )


def _check(q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec, engine: Engine) -> None:
    if spec.mask_fn is not None:
        raise ValueError("attention backend 'hopper' takes no mask_fn: use backend='xla'")
    if q.shape[3] not in FORWARD or v.shape[3] != q.shape[3]:
        raise ValueError(
            f"attention backend 'hopper' got head_dim {q.shape[3]} and value_dim {v.shape[3]}: "
            f"give one of {', '.join(map(str, FORWARD))} for both"
        )
    allowed = ("bfloat16", "float16") + (("float32",) if engine == "twins" else ())
    if q.dtype.name not in allowed:
        raise ValueError(
            f"attention backend 'hopper' got dtype {q.dtype}: give {' or '.join(allowed)}"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, tokens: Tokens, plan: Plan, engine: Engine):
    return _attend_forward(q, k, v, tokens, plan, engine)[0]


def _attend_forward(q_BTHD, k_BSKD, v_BSKD, tokens: Tokens, plan: Plan, engine: Engine):
    blocks = FORWARD[plan.D]
    tables = tables_of_queries(plan, blocks, tokens)
    results = _engine(engine).forward(plan, blocks, q_BTHD, k_BSKD, v_BSKD, tables)
    _, o_BTHD, lse_BHT = vary_alike(q_BTHD, *results)
    return (o_BTHD, lse_BHT), (q_BTHD, k_BSKD, v_BSKD, tokens, o_BTHD, lse_BHT)


def _attend_backward(plan: Plan, engine: Engine, residuals, cotangents):
    q, k, v, tokens, o, lse = residuals
    do, dlse_BHT = cotangents
    lse_BTH, dlse_BTH = (x.transpose(0, 2, 1) for x in (lse, dlse_BHT))
    delta = delta_of(o, lse_BTH, do, dlse_BTH).transpose(0, 2, 1)
    dq, dk, dv = _gradients(q, k, v, tokens, do, lse, delta, plan, engine)
    no_gradient = tuple(np.zeros(x.shape, jax.dtypes.float0) for x in tokens)
    return dq, dk, dv, Tokens(*no_gradient)  # pyright: ignore[reportArgumentType]


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(7, 8))
def _gradients(
    q_BTHD, k_BSKD, v_BSKD, tokens: Tokens, do_BTHD, lse_BHT, delta_BHT, plan: Plan, engine: Engine
):
    lse2_BHT = jnp.where(lse_BHT > -jnp.inf, lse_BHT * LOG2E, jnp.inf)
    arrays = (q_BTHD, k_BSKD, v_BSKD, do_BTHD, lse2_BHT, delta_BHT)
    module = _engine(engine)
    dq = module.dq(plan, DQ[plan.D], *arrays, tables_of_queries(plan, DQ[plan.D], tokens))
    dk, dv = module.dkv(plan, DKV[plan.D], *arrays, tables_of_keys(plan, DKV[plan.D], tokens))
    return tuple(vary_alike(q_BTHD, dq, dk, dv)[1:])


@_gradients.defjvp
def _no_second_derivative(plan, engine, primals, tangents):
    raise NotImplementedError(
        "attention backend 'hopper' has a first derivative only: use backend='reference' for higher"
    )


def _engine(engine: Engine):
    # Imported when used: the kernels need Mosaic GPU, which CPU machines need not have.
    if engine == "twins":
        from memtrain_kernels.attention.hopper import twins

        return twins
    from memtrain_kernels.attention.hopper import kernels

    return kernels
