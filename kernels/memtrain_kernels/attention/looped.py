"""Blockwise attention as loops over tiles: a program of one size for any length.

The outer loop takes a block of queries; the inner one runs over the kv blocks between the first and
the last that the block can see, passes by those between them that it cannot, and masks only those
that it sees in part.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from memtrain_kernels.attention import tiles
from memtrain_kernels.attention.blocks import (
    Plan,
    Summary,
    full_tiles,
    live_tiles,
    pad_tokens,
    summarise,
)
from memtrain_kernels.attention.tiles import Rows, Scaling, Tokens
from memtrain_kernels.varying import vary_as


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
    E = v_BKSE.shape[-1]
    block_rows = plan.block_q * (R // plan.T)
    q_BKRD = pad_tokens(q_BKRD, 2, block_rows)
    k_BKSD = pad_tokens(k_BKSD, 2, plan.block_kv)
    v_BKSE = pad_tokens(v_BKSE, 2, plan.block_kv)
    schedule = _Schedule(plan, tokens)

    def query_block(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        q = lax.dynamic_slice_in_dim(q_BKRD, i * block_rows, block_rows, axis=2)

        def dead(j: jax.Array, running: tiles.Running) -> tiles.Running:
            return running

        def partial(j: jax.Array, running: tiles.Running) -> tiles.Running:
            k, v = _slice_kv(plan, k_BKSD, j), _slice_kv(plan, v_BKSE, j)
            s = tiles.masked_scores(plan.spec, scaling, q, k, schedule.cut(i, j))
            return tiles.absorb(running, s, v)

        def full(j: jax.Array, running: tiles.Running) -> tiles.Running:
            k, v = _slice_kv(plan, k_BKSD, j), _slice_kv(plan, v_BKSE, j)
            return tiles.absorb(running, tiles.scores(plan.spec, scaling, q, k), v)

        first, last, kinds = schedule.row(i)

        def step(j: jax.Array, running: tiles.Running) -> tiles.Running:
            return lax.switch(kinds[j], (dead, partial, full), j, running)

        running = tiles.nothing(q, E)
        return tiles.finish(lax.fori_loop(first, last, step, running))

    o, lse = lax.map(query_block, jnp.arange(plan.num_q))
    return _blocks_to_rows(o)[:, :, :R], _blocks_to_rows(lse)[:, :, :R]


def backward(
    plan: Plan,
    scaling: Scaling,
    rows: Rows,
    k_BKSD: jax.Array,
    v_BKSE: jax.Array,
    tokens: Tokens,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq [B, K, R, D], dk [B, K, D, S], dv [B, K, E, S], before the scales."""
    B, K, R, D = rows.q_BKRD.shape
    S, E = k_BKSD.shape[2], v_BKSE.shape[-1]
    block_rows = plan.block_q * (R // plan.T)
    rows = Rows(
        pad_tokens(rows.q_BKRD, 2, block_rows),
        pad_tokens(rows.q_BKDR, 3, block_rows),
        pad_tokens(rows.do_BKRE, 2, block_rows),
        pad_tokens(rows.do_BKER, 3, block_rows),
        pad_tokens(rows.lse_BKR1, 2, block_rows),
        pad_tokens(rows.delta_BKR1, 2, block_rows),
    )
    k_BKSD = pad_tokens(k_BKSD, 2, plan.block_kv)
    v_BKSE = pad_tokens(v_BKSE, 2, plan.block_kv)
    schedule = _Schedule(plan, tokens)

    def zeros(rows: int, columns: int) -> jax.Array:
        dtype = tiles.accumulation_dtype(k_BKSD.dtype)
        return vary_as(jnp.zeros((B, K, rows, columns), dtype), k_BKSD)

    def query_block(
        carry: tuple[jax.Array, jax.Array], i: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        def at(x: jax.Array, axis: int) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, i * block_rows, block_rows, axis=axis)

        block = Rows(*(at(x, 3 if n in (1, 3) else 2) for n, x in enumerate(rows)))

        def partial(j: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            k, v = _slice_kv(plan, k_BKSD, j), _slice_kv(plan, v_BKSE, j)
            return tiles.tile_gradients(plan.spec, scaling, block, k, v, schedule.cut(i, j))

        def full(j: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            k, v = _slice_kv(plan, k_BKSD, j), _slice_kv(plan, v_BKSE, j)
            return tiles.tile_gradients(plan.spec, scaling, block, k, v, None)

        def dead(j: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            return zeros(block_rows, D), zeros(D, plan.block_kv), zeros(E, plan.block_kv)

        first, last, kinds = schedule.row(i)

        def step(j: jax.Array, sums: tuple[jax.Array, jax.Array, jax.Array]):
            dq, dk, dv = sums
            # The branches return a tile's share, not the sums: a branch would copy those.
            shares = lax.switch(kinds[j], (dead, partial, full), j)
            return (
                dq + shares[0],
                _add_at(dk, shares[1], j * plan.block_kv),
                _add_at(dv, shares[2], j * plan.block_kv),
            )

        dq, dk, dv = lax.fori_loop(first, last, step, (zeros(block_rows, D), *carry))
        return (dk, dv), dq

    S_padded = k_BKSD.shape[2]
    sums = zeros(D, S_padded), zeros(E, S_padded)
    (dk, dv), dq = lax.scan(query_block, sums, jnp.arange(plan.num_q))
    return _blocks_to_rows(dq)[:, :, :R], dk[..., :S], dv[..., :S]


class _Schedule:
    """Which kv blocks a query block visits, and the tokens of a tile."""

    def __init__(self, plan: Plan, tokens: Tokens) -> None:
        self._plan = plan
        # Tokens added to fill the last block are of a negative segment: nothing sees them.
        self._tokens = t = Tokens(
            pad_tokens(tokens.q_pos, 1, plan.block_q),
            pad_tokens(tokens.kv_pos, 1, plan.block_kv),
            pad_tokens(tokens.q_seg, 1, plan.block_q, fill=-1),
            pad_tokens(tokens.kv_seg, 1, plan.block_kv, fill=-1),
        )
        self._q = summarise(t.q_pos, t.q_seg, plan.block_q)
        self._kv = summarise(t.kv_pos, t.kv_seg, plan.block_kv)

    def row(self, i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """First and last (exclusive) kv block to visit; and of all, int32 [num_kv], whether the
        block is dead (0), seen in part (1) or in full by every row of the batch (2)."""
        plan = self._plan
        lo = i * plan.block_q
        a = jnp.arange(plan.num_kv) * plan.block_kv
        q = Summary(*(lax.dynamic_slice_in_dim(x, i, 1, axis=1) for x in self._q))
        live = plan.possible_by_index(lo, lo + plan.block_q, a, a + plan.block_kv)
        live = live & jnp.any(live_tiles(plan.spec, q, self._kv), axis=0)
        full = live & jnp.all(full_tiles(plan.spec, q, self._kv), axis=0)
        some = jnp.any(live)
        first = jnp.where(some, jnp.argmax(live), 0)
        last = jnp.where(some, plan.num_kv - jnp.argmax(live[::-1]), 0)
        return first, last, live.astype(jnp.int32) + full

    def cut(self, i: jax.Array, j: jax.Array) -> Tokens:
        plan, t = self._plan, self._tokens

        def at(x: jax.Array, n: jax.Array, block: int) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, n * block, block, axis=1)

        return Tokens(
            at(t.q_pos, i, plan.block_q),
            at(t.kv_pos, j, plan.block_kv),
            at(t.q_seg, i, plan.block_q),
            at(t.kv_seg, j, plan.block_kv),
        )


def _slice_kv(plan: Plan, x_BKSD: jax.Array, j: jax.Array) -> jax.Array:
    return lax.dynamic_slice_in_dim(x_BKSD, j * plan.block_kv, plan.block_kv, axis=2)


def _add_at(total: jax.Array, part: jax.Array, index: jax.Array) -> jax.Array:
    old = lax.dynamic_slice_in_dim(total, index, part.shape[-1], axis=3)
    return lax.dynamic_update_slice_in_dim(total, old + part, index, axis=3)


def _blocks_to_rows(x: jax.Array) -> jax.Array:
    """[blocks, B, K, rows, D] to [B, K, blocks * rows, D]."""
    N, B, K, R, D = x.shape
    return x.transpose(1, 2, 0, 3, 4).reshape(B, K, N * R, D)
