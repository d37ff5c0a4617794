"""The twins of the kernels: the same loops over the same tiles in plain jnp, on any device.

Mosaic GPU code with wgmma cannot be interpreted, so a twin shares with its kernel what can be
shared (the tables, the walk, the choice between skipped, partial and full, the arithmetic of a
tile) and repeats the rest (the order of sums, every rounding to the inputs' dtype). Held to an
oracle it proves the algorithm; memory traffic, barriers and layouts it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from memtrain_kernels.attention.hopper import tile
from memtrain_kernels.attention.hopper.plan import (
    POS,
    SEG,
    Blocks,
    Plan,
    Tables,
    read_summary,
    read_walk,
)
from memtrain_kernels.attention.hopper.schedule import Summary, Walk, full, live, visit


def forward(
    plan: Plan,
    blocks: Blocks,
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    tables: Tables,
) -> tuple[jax.Array, jax.Array]:
    """As forward.forward: o [B, T, H, D] and lse [B, H, T]."""
    scoring, dtype = plan.scoring, q_BTHD.dtype

    def block(b: jax.Array, h: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = _Own(plan, tables, b, i, own_is_q=True)
        q = _cut(q_BTHD, b, i, h, blocks.block_q)
        kv_head = h // plan.group

        def absorb(j: jax.Array, carry):
            n, acc, softmax = carry
            products = _dot(q, _cut(k_BSKD, b, j, kv_head, blocks.block_kv).T)
            raw = own.masked(j, scoring.raw(products))
            softmax, p, fade = tile.absorb(softmax, raw, scoring.factor)
            v = _cut(v_BSKD, b, j, kv_head, blocks.block_kv)
            acc = acc * tile.across(fade, acc.shape, 0) + _dot(p.astype(dtype), v)
            return n + 1, acc, softmax

        nothing = tile.Softmax(jnp.full(blocks.block_q, -jnp.inf), jnp.zeros(blocks.block_q))
        acc = jnp.zeros((blocks.block_q, plan.D))
        n, acc, softmax = own.visit(absorb, (jnp.int32(0), acc, nothing))
        weight, lse = tile.finish(softmax)
        o = (acc * tile.across(weight, acc.shape, 0)).astype(dtype)
        return _if_counted(n, own.walk.count, o), lse

    o, lse = _over_blocks(block, plan.B, plan.H, plan.T // blocks.block_q)
    return _tokens_first(o), lse.reshape(plan.B, plan.H, plan.T)


def dq(
    plan: Plan,
    blocks: Blocks,
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    do_BTHD: jax.Array,
    lse2_BHT: jax.Array,
    delta_BHT: jax.Array,
    tables: Tables,
) -> jax.Array:
    """As dq.dq: dq [B, T, H, D]."""
    scoring, dtype = plan.scoring, q_BTHD.dtype

    def block(b: jax.Array, h: jax.Array, i: jax.Array) -> jax.Array:
        own = _Own(plan, tables, b, i, own_is_q=True)
        q, do = (_cut(x, b, i, h, blocks.block_q) for x in (q_BTHD, do_BTHD))
        lse2, delta = (_cut_numbers(x, b, h, i, blocks.block_q) for x in (lse2_BHT, delta_BHT))

        def add(j: jax.Array, carry):
            n, acc = carry
            k, v = (_cut(x, b, j, h // plan.group, blocks.block_kv) for x in (k_BSKD, v_BSKD))
            raw = own.masked(j, scoring.raw(_dot(q, k.T)))
            p = tile.probabilities(raw, scoring.factor, lse2, axis=0)
            ds = tile.logit_gradient(scoring.sloped(p, raw), _dot(do, v.T), delta, axis=0)
            return n + 1, acc + _dot(ds.astype(dtype), k)

        n, acc = own.visit(add, (jnp.int32(0), jnp.zeros((blocks.block_q, plan.D))))
        return _if_counted(n, own.walk.count, (acc * scoring.scale).astype(dtype))

    return _tokens_first(_over_blocks(block, plan.B, plan.H, plan.T // blocks.block_q))


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
    """As dkv.dkv and dkv_split.dkv, which differ only in who computes what: [B, S, K, D]."""
    scoring, dtype = plan.scoring, q_BTHD.dtype

    def block(b: jax.Array, kv_head: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = _Own(plan, tables, b, j, own_is_q=False)
        k, v = (_cut(x, b, j, kv_head, blocks.block_kv) for x in (k_BSKD, v_BSKD))

        def of_head(g: jax.Array, carry):
            h = kv_head * plan.group + g

            def add(i: jax.Array, carry):
                n, dk, dv = carry
                q, do = (_cut(x, b, i, h, blocks.block_q) for x in (q_BTHD, do_BTHD))
                lse2 = _cut_numbers(lse2_BHT, b, h, i, blocks.block_q)
                delta = _cut_numbers(delta_BHT, b, h, i, blocks.block_q)
                raw = own.masked(i, scoring.raw(_dot(k, q.T)))
                p = tile.probabilities(raw, scoring.factor, lse2, axis=1)
                ds = tile.logit_gradient(scoring.sloped(p, raw), _dot(v, do.T), delta, axis=1)
                return n + 1, dk + _dot(ds.astype(dtype), q), dv + _dot(p.astype(dtype), do)

            return own.visit(add, carry)

        nothing = jnp.zeros((blocks.block_kv, plan.D))
        n, dk, dv = lax.fori_loop(0, plan.group, of_head, (jnp.int32(0), nothing, nothing))
        dk = (dk * scoring.scale).astype(dtype)
        return _if_counted(n, own.walk.count * plan.group, dk), dv.astype(dtype)

    dk, dv = _over_blocks(block, plan.B, plan.K, plan.S // blocks.block_kv)
    return _tokens_first(dk), _tokens_first(dv)


class _Own:
    """The block that a thread block owns: its walk, and the tiles it makes with other blocks."""

    def __init__(self, plan: Plan, tables: Tables, b: jax.Array, n: jax.Array, own_is_q: bool):
        self._spec, self._tables, self._own_is_q = plan.spec, tables, own_is_q
        self._b = b if plan.token_batch > 1 else 0
        self._n = n
        self._summary = read_summary(tables.own, self._b, n)
        self.walk: Walk = read_walk(tables.walks, self._b, n)

    def visit(self, tile_of: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
        is_live = lambda m: live(self._spec, *self._pair(m))  # noqa: E731
        return visit(self._spec, self.walk, is_live, tile_of, carry)

    def masked(self, m: jax.Array, raw: jax.Array) -> jax.Array:
        own, other = self._tables.own[self._b, self._n], self._tables.other[self._b, m]
        q, kv = (own, other) if self._own_is_q else (other, own)
        axis = 0 if self._own_is_q else 1
        seen = full(self._spec, *self._pair(m))
        masked = tile.masked(self._spec, raw, q[POS], q[SEG], kv[POS], kv[SEG], axis)
        return jnp.where(seen, raw, masked)

    def _pair(self, m: jax.Array) -> tuple[Summary, Summary]:
        other = read_summary(self._tables.other, self._b, m)
        return (self._summary, other) if self._own_is_q else (other, self._summary)


def _over_blocks(block: Callable, B: int, heads: int, blocks: int) -> Any:
    """block(b, head, n) for every thread block: [B, heads, blocks, ...]."""
    grid = jnp.stack(
        jnp.meshgrid(jnp.arange(B), jnp.arange(heads), jnp.arange(blocks), indexing="ij"), axis=-1
    )
    out = lax.map(lambda at: block(at[0], at[1], at[2]), grid.reshape(-1, 3))
    return jax.tree.map(lambda x: x.reshape(B, heads, blocks, *x.shape[1:]), out)


def _tokens_first(x: jax.Array) -> jax.Array:
    """[B, heads, blocks, block, D] to [B, tokens, heads, D]."""
    B, heads, blocks, block, D = x.shape
    return x.transpose(0, 2, 3, 1, 4).reshape(B, blocks * block, heads, D)


def _cut(x_BTHD: jax.Array, b, n, h, block: int) -> jax.Array:
    D = x_BTHD.shape[3]
    return lax.dynamic_slice(x_BTHD, (b, n * block, h, 0), (1, block, 1, D)).reshape(block, D)


def _cut_numbers(x_BHT: jax.Array, b, h, n, block: int) -> jax.Array:
    return lax.dynamic_slice(x_BHT, (b, h, n * block), (1, 1, block)).reshape(block)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _if_counted(visited: jax.Array, count: jax.Array, x: jax.Array) -> jax.Array:
    """x, or NaN where the walk visited other than the announced number of tiles: a kernel's loading
    and computing warpgroups would wait for each other for ever."""
    return jnp.where(visited == count, x, jnp.nan)
