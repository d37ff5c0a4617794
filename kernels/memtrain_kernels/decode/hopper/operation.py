"""One decode call around the kernel: how queries lie, the runs, joining the splits."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.decode.hopper.plan import Plan, make_plan
from memtrain_kernels.decode.hopper.schedule import make_runs
from memtrain_kernels.decode.paging import Pages


Engine = Literal["kernel", "twin"]
"""What computes the tiles: the GPU kernel, or the same loop in plain jnp on any device."""


def attend_by(
    engine: Engine,
    q_BTHD: jax.Array,
    pages: Pages,
    spec: AttentionSpec,
    num_splits: int | None,
) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, E] and lse [B, T, H], both float32. The twin takes float32 too, and any dims."""
    return _attend(engine, q_BTHD, pages, make_plan(q_BTHD, pages, spec, num_splits))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _attend(
    engine: Engine, q_BTHD: jax.Array, pages: Pages, plan: Plan
) -> tuple[jax.Array, jax.Array]:
    # Imported when used: the kernel needs Mosaic GPU, which CPU machines need not have.
    if engine == "kernel":
        from memtrain_kernels.decode.hopper.kernel import partials
    else:
        from memtrain_kernels.decode.hopper.twin import partials
    q_BCND, factors_BCN = gather_queries(plan, q_BTHD), None
    if plan.scales_queries:
        q_BCND, factors_BCN = make_room(q_BCND)
    q_BCND = q_BCND.astype(plan.score_dtype)
    o_BCEN, lse_BCN = join(*partials(plan, q_BCND, factors_BCN, pages, make_runs(plan, pages)))
    if plan.v_scales == "head" and pages.v_scales is not None:
        v_scales_C = jnp.repeat(pages.v_scales, plan.chunks)
        o_BCEN = o_BCEN * v_scales_C[:, None, None]
    return scatter_queries(plan, o_BCEN.swapaxes(2, 3)), scatter_queries(plan, lse_BCN)


def gather_queries(plan: Plan, q_BTHD: jax.Array) -> jax.Array:
    """q [B, C, N, D]: the chunks of N queries of every key head, the last one padded by zeros."""
    q = q_BTHD.reshape(plan.B, plan.T, plan.K, plan.group, plan.D).transpose(0, 2, 1, 3, 4)
    q_BKRD = q.reshape(plan.B, plan.K, plan.T * plan.group, plan.D)
    missing = plan.chunks * plan.columns - q_BKRD.shape[2]
    q_BKRD = jnp.pad(q_BKRD, ((0, 0), (0, 0), (0, missing), (0, 0)))
    return q_BKRD.reshape(plan.B, plan.K * plan.chunks, plan.columns, plan.D)


def make_room(q_BCND: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Queries in float32 divided by a power of two each, so that the greatest number is 1 to 2, and
    those powers [B, C, N]. Nothing is rounded."""
    q = q_BCND.astype(jnp.float32)
    _, exponent = jnp.frexp(jnp.max(jnp.abs(q), axis=-1))
    powers_BCN = jnp.ldexp(jnp.float32(1), jnp.clip(exponent - 1, -120, 127))
    return q / powers_BCN[..., None], powers_BCN


def scatter_queries(plan: Plan, x: jax.Array) -> jax.Array:
    """[B, C, N, ...] to [B, T, H, ...]."""
    B, T, K, G = plan.B, plan.T, plan.K, plan.group
    x = x.reshape(B, K, plan.chunks * plan.columns, *x.shape[3:])[:, :, : T * G]
    return x.reshape(B, K, T, G, *x.shape[3:]).swapaxes(1, 2).reshape(B, T, K * G, *x.shape[3:])


def join(o_ZBCEN: jax.Array, lse_ZBCN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The result over all Z splits from those over each: one pass over them, in their order."""
    if o_ZBCEN.shape[0] == 1:
        return o_ZBCEN[0], lse_ZBCN[0]
    greatest = jnp.max(lse_ZBCN, axis=0)
    shift = jnp.where(greatest == -jnp.inf, 0, greatest)
    weight = jnp.exp(lse_ZBCN - shift)
    total = jnp.sum(weight, axis=0)
    o = jnp.sum(o_ZBCEN * weight[:, :, :, None], axis=0)
    # The greatest one weighs 1, so a total < 1 says that no split saw anything.
    total = jnp.maximum(total, 1)
    return o / total[:, :, None], jnp.where(greatest == -jnp.inf, greatest, shift + jnp.log(total))
