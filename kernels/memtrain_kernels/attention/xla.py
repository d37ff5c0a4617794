"""The blockwise backend in plain XLA: O(T) memory forward and backward, on any device.

Forward keeps only the log-sum-exp a row; backward recomputes each tile's probabilities from it, as
in FlashAttention (arXiv 2205.14135). The cotangent of the log-sum-exp enters through delta.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from memtrain_kernels.attention import direct, looped, tiles, unrolled
from memtrain_kernels.attention.blocks import Plan, make_plan
from memtrain_kernels.attention.capabilities import Capabilities
from memtrain_kernels.attention.delta import delta_of
from memtrain_kernels.attention.masks import fill_defaults
from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.attention.tiles import Rows, Scaling, Tokens
from memtrain_kernels.varying import vary_alike


CAPABILITIES = Capabilities("xla", verified_on=("*",))
"""Serves everything, everywhere: plain jnp, held to a float64 oracle by the tests."""


def attend(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKE: jax.Array,
    q_pos: jax.Array | None,
    kv_pos: jax.Array | None,
    q_seg: jax.Array | None,
    kv_seg: jax.Array | None,
    spec: AttentionSpec,
) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, E] and lse [B, T, H] in the accumulation dtype; as reference.attend."""
    given = (q_pos, kv_pos, q_seg, kv_seg)
    plan = _plan_of(q_BTHD, k_BSKD, given, spec)
    arrays = vary_alike(q_BTHD, k_BSKD, v_BSKE, *fill_defaults(plan.T, plan.S, *given))
    return _attend(*arrays[:3], Tokens(*arrays[3:]), plan)


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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What these keys add to dq, dk and dv, in the accumulation dtype, as in `attend`.

    lse is the denominator over all keys, these and others; delta is rowsum(do * o) - dlse of the
    same whole, 0 where lse is -inf.
    """
    given = (q_pos, kv_pos, q_seg, kv_seg)
    plan = _plan_of(q_BTHD, k_BSKD, given, spec)
    tokens = fill_defaults(plan.T, plan.S, *given)
    arrays = vary_alike(q_BTHD, k_BSKD, v_BSKE, do_BTHE, lse_BTH, delta_BTH, *tokens)
    return _gradients(*arrays[:3], Tokens(*arrays[6:]), *arrays[3:6], plan)


def _plan_of(q_BTHD, k_BSKD, given, spec: AttentionSpec) -> Plan:
    return make_plan(
        q_BTHD.shape[1],
        k_BSKD.shape[1],
        group=q_BTHD.shape[2] // k_BSKD.shape[2],
        by_default=given[0] is None and given[1] is None,
        data=any(x is not None for x in given),
        spec=spec,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, tokens: Tokens, plan: Plan):
    return _attend_forward(q, k, v, tokens, plan)[0]


def _attend_forward(q_BTHD, k_BSKD, v_BSKE, tokens: Tokens, plan: Plan):
    num_kv_heads = k_BSKD.shape[2]
    group = q_BTHD.shape[2] // num_kv_heads
    scaling = _scaling(plan.spec, q_BTHD)
    if direct.serves(plan, num_kv_heads, group):
        o_BTHE, lse_BTH = direct.forward(
            plan, scaling, _scaled(q_BTHD, scaling), k_BSKD, v_BSKE, tokens
        )
        return (o_BTHE, lse_BTH), (q_BTHD, k_BSKD, v_BSKE, tokens, o_BTHE, lse_BTH)
    o_BKRE, lse_BKR1 = _form(plan).forward(
        plan,
        scaling,
        tiles.fold(_scaled(q_BTHD, scaling), num_kv_heads),
        k_BSKD.transpose(0, 2, 1, 3),
        v_BSKE.transpose(0, 2, 1, 3),
        tokens,
    )
    o_BTHE = tiles.unfold(o_BKRE, group)
    lse_BTH = tiles.unfold(lse_BKR1, group)[..., 0]
    return (o_BTHE, lse_BTH), (q_BTHD, k_BSKD, v_BSKE, tokens, o_BTHE, lse_BTH)


def _attend_backward(plan: Plan, residuals, cotangents):
    *arrays, tokens, o, lse = residuals
    do, dlse = cotangents
    found = _gradients(*arrays, tokens, do, lse, delta_of(o, lse, do, dlse), plan)
    dq, dk, dv = (x.astype(array.dtype) for x, array in zip(found, arrays, strict=True))
    no_gradient = tuple(np.zeros(x.shape, jax.dtypes.float0) for x in tokens)
    return dq, dk, dv, Tokens(*no_gradient)  # pyright: ignore[reportArgumentType]


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(7,))
def _gradients(q_BTHD, k_BSKD, v_BSKE, tokens: Tokens, do_BTHE, lse_BTH, delta_BTH, plan):
    num_kv_heads = k_BSKD.shape[2]
    group = q_BTHD.shape[2] // num_kv_heads
    dtype = q_BTHD.dtype
    spec = plan.spec
    scaling = _scaling(spec, q_BTHD)
    q_BKRD = tiles.fold(_scaled(q_BTHD, scaling), num_kv_heads)
    do_BKRE = tiles.fold(do_BTHE.astype(dtype), num_kv_heads)
    rows = Rows(
        q_BKRD,
        q_BKRD.swapaxes(2, 3),
        do_BKRE,
        do_BKRE.swapaxes(2, 3),
        tiles.fold(tiles.finite(lse_BTH)[..., None], num_kv_heads),
        tiles.fold(delta_BTH[..., None], num_kv_heads),
    )
    dq_BKRD, dk_BKDS, dv_BKES = _form(plan).backward(
        plan,
        scaling,
        rows,
        k_BSKD.transpose(0, 2, 1, 3),
        v_BSKE.transpose(0, 2, 1, 3),
        tokens,
    )
    dq = tiles.unfold(dq_BKRD * spec.scale_for(q_BTHD.shape[-1]), group)
    dk = dk_BKDS.transpose(0, 3, 1, 2) * scaling.on_scores
    return dq, dk, dv_BKES.transpose(0, 3, 1, 2)


@_gradients.defjvp
def _no_second_derivative(plan, primals, tangents):
    raise NotImplementedError(
        "attention backend 'xla' has a first derivative only: use backend='reference' for higher"
    )


def _form(plan: Plan) -> ModuleType:
    return unrolled if plan.unrolled else looped


def _scaling(spec: AttentionSpec, q: jax.Array) -> Scaling:
    scale = spec.scale_for(q.shape[-1])
    # A power of two changes no digit; but float16 has few exponents, and must not overflow.
    exact = q.dtype.itemsize >= 4 or (abs(math.frexp(scale)[0]) == 0.5 and abs(scale) <= 1)
    return Scaling(scale, 1.0) if exact else Scaling(1.0, scale)


def _scaled(q: jax.Array, scaling: Scaling) -> jax.Array:
    return q if scaling.on_q == 1 else q * jnp.asarray(scaling.on_q, q.dtype)
