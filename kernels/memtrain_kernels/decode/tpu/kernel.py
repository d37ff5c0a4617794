"""The TPU kernel of decoding: fetch blocks of pages, one ahead, and keep a running softmax.

The grid is splits x rows. A split of a row is a run of blocks, a block C of the row's live pages
(`paging.Live`), each fetched by a copy of its own, since pages lie anywhere. While a block is
worked on, the next one is on its way, be it of this row or of the next that has work: so the memory
never waits for a row to end. Which page is fetched when depends on scalars alone (`Schedule`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memtrain_kernels.attention.masks import visible
from memtrain_kernels.decode.tpu.call import Call
from memtrain_kernels.decode.tpu.pages import block_shape, clear, heads, page_pieces


# Row statistics are kept as wide as a vector register, the same number in each lane.
_LANES = 128
# Of on-chip memory (64 MiB on v5p, 128 on v5e and v6e); what `Capabilities` lets in takes less.
_VMEM_BYTES = 48 * 2**20


class Schedule(NamedTuple):
    """Scalars of a call: int32 [B] each, [B * M] (tables) or [N * B] (from first_block on).

    low, gap, count: the row's live pages. first_block: the split's first block; blocks: how many;
    before: those of the split's earlier rows; next_row: the split's next row with any, else B.
    """

    tables: Any
    lengths: Any
    low: Any
    gap: Any
    count: Any
    first_block: Any
    blocks: Any
    before: Any
    next_row: Any


def run(
    call: Call,
    schedule: Schedule,
    q_BKRD: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    k_scales: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """o [N, B, K, R, E] and lse [N, B, K, R], float32: each split's result over its own keys."""
    B, K, R, D = q_BKRD.shape
    E = v_pages.shape[3]
    # The token of each query row: a division that the chip need not do.
    token_R1 = np.minimum(np.arange(R, dtype=np.int32) // call.G, call.T - 1)[:, None]
    scale_K = jnp.full((K,), call.scale, jnp.float32)
    if k_scales is not None:
        scale_K = scale_K * k_scales
    scale_K1L = jnp.broadcast_to(scale_K[:, None, None], (K, 1, _LANES))
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        lambda *refs: _kernel(call, B, Schedule(*refs[:9]), *refs[9:]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(schedule),
            grid=(call.N, B),
            in_specs=[
                pl.BlockSpec((R, 1), lambda n, b, *_: (0, 0)),
                pl.BlockSpec((K, 1, _LANES), lambda n, b, *_: (0, 0, 0)),
                pl.BlockSpec((None, K, R, D), lambda n, b, *_: (b, 0, 0, 0)),
                whole,
                whole,
            ],
            out_specs=[
                pl.BlockSpec((None, None, K, R, E), lambda n, b, *_: (n, b, 0, 0, 0)),
                pl.BlockSpec((None, None, K, R), lambda n, b, *_: (n, b, 0, 0)),
            ],
            scratch_shapes=[
                pltpu.VMEM((2, *block_shape(call, K, D)), k_pages.dtype),
                pltpu.VMEM((2, *block_shape(call, K, E)), v_pages.dtype),
                pltpu.VMEM((K, R, _LANES), jnp.float32),
                pltpu.VMEM((K, R, _LANES), jnp.float32),
                pltpu.VMEM((K, R, E), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((call.N, B, K, R, E), jnp.float32),
            jax.ShapeDtypeStruct((call.N, B, K, R), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=_cost(call, q_BKRD, k_pages, v_pages),
        interpret=call.interpret,
        name="paged_attention",
    )(*schedule, token_R1, scale_K1L, q_BKRD, k_pages, v_pages)


def _cost(call: Call, q_BKRD: jax.Array, k_pages: jax.Array, v_pages: jax.Array) -> pl.CostEstimate:
    """Of full tables, as the lengths are not known yet."""
    B, K, R, D = q_BKRD.shape
    E, keys = v_pages.shape[3], B * call.M * call.S * K
    return pl.CostEstimate(
        flops=2 * keys * R * (D + E),
        transcendentals=keys * R,
        bytes_accessed=keys * (D + E) * k_pages.dtype.itemsize,
    )


class _Pool(NamedTuple):
    """Keys or values: all pages, the two slots for blocks, and a semaphore for each slot."""

    pages: Any
    slots: Any
    sems: Any


class _Fetch:
    """The copies of one block, the `block`-th of a row, into one of the two slots."""

    def __init__(self, call: Call, scalars: Schedule, keys: _Pool, values: _Pool) -> None:
        self._call = call
        self._scalars = scalars
        self._keys = keys
        self._values = values

    def pages(self, row: jax.Array, block: jax.Array) -> jax.Array:
        """How many pages the block has."""
        return jnp.minimum(self._scalars.count[row] - block * self._call.C, self._call.C)

    def start(self, row: jax.Array, block: jax.Array, slot: jax.Array | int) -> None:
        call, scalars = self._call, self._scalars

        def start_page(i, _):
            index = block * call.C + i
            place = index + jnp.where(index >= scalars.low[row], scalars.gap[row], 0)
            page = scalars.tables[row * call.M + place]
            for pool in (self._keys, self._values):
                for copy in self._copies(pool, page, i, slot):
                    copy.start()
            return 0

        lax.fori_loop(0, self.pages(row, block), start_page, 0)

    def wait_keys(self, row: jax.Array, block: jax.Array, slot: jax.Array | int) -> None:
        self._wait(self._keys, self.pages(row, block), slot)

    def wait_values(self, row: jax.Array, block: jax.Array, slot: jax.Array | int) -> None:
        self._wait(self._values, self.pages(row, block), slot)

    def _wait(self, pool: _Pool, pages: jax.Array, slot: jax.Array | int) -> None:
        def wait_page(i, _):  # a wait counts bytes: which page it names makes no difference
            for copy in self._copies(pool, 0, i, slot):
                copy.wait()
            return 0

        lax.fori_loop(0, pages, wait_page, 0)

    def _copies(self, pool: _Pool, page: Any, i: jax.Array, slot: jax.Array | int) -> list[Any]:
        pieces = page_pieces(self._call, pool.pages.at[page], pool.slots.at[slot], i)
        return [pltpu.make_async_copy(*piece, pool.sems.at[slot]) for piece in pieces]


def _kernel(
    call: Call,
    B: int,
    scalars: Schedule,
    token_ref,
    scale_ref,
    q_ref,
    k_pool,
    v_pool,
    o_ref,
    lse_ref,
    k_buf,
    v_buf,
    m_ref,
    total_ref,
    acc_ref,
    k_sems,
    v_sems,
) -> None:
    split, row = pl.program_id(0), pl.program_id(1)
    keys, values = _Pool(k_pool, k_buf, k_sems), _Pool(v_pool, v_buf, v_sems)
    fetch = _Fetch(call, scalars, keys, values)
    at = split * B + row
    first, blocks = scalars.first_block[at], scalars.blocks[at]
    before, next_row = scalars.before[at], scalars.next_row[at]

    @pl.when((before == 0) & (blocks > 0))
    def _():  # no row came before that could have fetched it
        fetch.start(row, first, 0)

    m_ref[...] = jnp.full_like(m_ref, -jnp.inf)
    total_ref[...] = jnp.zeros_like(total_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)

    def step(j, _):
        block, slot = first + j, lax.rem(before + j, 2)

        @pl.when(j + 1 < blocks)
        def _():
            fetch.start(row, block + 1, 1 - slot)

        @pl.when((j + 1 == blocks) & (next_row < B))
        def _():
            fetch.start(next_row, scalars.first_block[split * B + next_row], 1 - slot)

        # Tokens of the block that exist: only the row's last page may have empty slots.
        pages = fetch.pages(row, block)
        index = block * call.C + pages
        end = index + jnp.where(index > scalars.low[row], scalars.gap[row], 0)
        held = pages * call.S - jnp.maximum(end * call.S - scalars.lengths[row], 0)
        seen_RX = _seen(call, scalars, row, block, held, token_ref[...])

        fetch.wait_keys(row, block, slot)
        dtype = q_ref.dtype
        k_XD = heads(call, k_buf.at[slot], dtype)
        s_KRX = jnp.stack([_product(q_ref[h], k, 1) for h, k in enumerate(k_XD)])
        s_KRX = s_KRX * scale_ref[...][:, :, :1]
        if call.spec.soft_cap is not None:
            s_KRX = call.spec.soft_cap * jnp.tanh(s_KRX / call.spec.soft_cap)
        s_KRX = jnp.where(seen_RX[None], s_KRX, -jnp.inf)
        m_KR1 = m_ref[...][:, :, :1]
        new_KR1 = jnp.maximum(m_KR1, jnp.max(s_KRX, axis=2, keepdims=True))
        shift_KR1 = jnp.where(new_KR1 == -jnp.inf, 0, new_KR1)
        p_KRX = jnp.exp(s_KRX - shift_KR1)
        fade_KR1 = jnp.exp(m_KR1 - shift_KR1)
        m_ref[...] = jnp.broadcast_to(new_KR1, m_ref.shape)
        total_ref[...] = total_ref[...] * fade_KR1 + jnp.sum(p_KRX, axis=2, keepdims=True)
        p_KRX = p_KRX.astype(dtype)

        fetch.wait_values(row, block, slot)

        @pl.when(held < call.tokens)
        def _():  # weights are 0 there, but 0 times NaN is NaN
            clear(call, v_buf.at[slot], held)

        v_XE = heads(call, v_buf.at[slot], dtype)
        o_KRE = jnp.stack([_product(p_KRX[h], v, 0) for h, v in enumerate(v_XE)])
        acc_ref[...] = acc_ref[...] * fade_KR1 + o_KRE
        return 0

    lax.fori_loop(0, blocks, step, 0)
    # The greatest score adds 1 to the total, so less says that nothing was seen.
    total = jnp.maximum(total_ref[...], 1)
    o_ref[...] = acc_ref[...] / total[:, :, :1]
    lse_ref[...] = jnp.max(m_ref[...] + jnp.log(total), axis=2)  # one number, in every lane


def _seen(call: Call, scalars: Schedule, row, block, held, token_R1) -> jax.Array:
    """Which tokens of a block each query row sees: bool [R, X]."""
    shape = (token_R1.shape[0], call.tokens)
    x = lax.broadcasted_iota(jnp.int32, shape, 1)
    live = x + block * call.tokens
    gap = scalars.gap[row] * call.S
    kv_pos = live + jnp.where(live >= scalars.low[row] * call.S, gap, 0)
    q_pos = jnp.broadcast_to(token_R1, shape) + (scalars.lengths[row] - call.T)
    q_seg = jnp.where(q_pos >= 0, 0, -1)
    kv_seg = jnp.where(x < held, 0, -1)
    return visible(call.spec, q_pos, kv_pos, q_seg, kv_seg)


def _product(x: jax.Array, y: jax.Array, contract: int) -> jax.Array:
    """x [R, A] with y, over A and dim `contract` of y; float32."""
    return lax.dot_general(
        x,
        y,
        (((1,), (contract,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
