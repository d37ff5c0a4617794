"""The call around the TPU kernel: what the scalars say, how arrays lie, joining the splits."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from memtrain_kernels.attention.merge import merge
from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.decode.paging import Pages, live_pages
from memtrain_kernels.decode.tpu import CAPABILITIES, heads_lie_first
from memtrain_kernels.decode.tpu.call import Call
from memtrain_kernels.decode.tpu.kernel import Schedule, run
from memtrain_kernels.target import current_target


# Page numbers of one kernel call, in scalar memory (1 MiB in all); more rows take more calls.
_TABLE_BYTES = 512 * 2**10
_MAX_ROWS = 1024
# Of one block: its keys and values, of which two blocks are held, and its float32 scores.
_BLOCK_BYTES = 2 * 2**20
_SCORE_BYTES = 2 * 2**20
_BLOCK_TOKENS = 512
_LARGEST_BLOCK_BYTES = 4 * 2**20
_TWO_CORES = ("v4", "v5p", "v5")


def cores() -> int:
    """Cores that share the memory of the target's device: splits that run at the same time."""
    kind = current_target().device_kind.lower()
    return 2 if kind.startswith("tpu") and kind.split()[-1] in _TWO_CORES else 1


@functools.partial(jax.jit, static_argnames=("spec", "num_splits", "interpret"))
def attend(
    q_BTHD: jax.Array, pages: Pages, spec: AttentionSpec, num_splits: int, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, E] and lse [B, T, H], float32.

    N splits. R = T * G query rows of a key head, of T queries and G query heads.
    """
    B, T, H, D = q_BTHD.shape
    S, K, E = pages.v_PSKE.shape[1:]
    G, M = H // K, pages.tables_BM.shape[1]
    R, row_tile = T * G, CAPABILITIES.row_tile
    dtype = _operand_dtype(q_BTHD.dtype, pages.k_PSKD.dtype)
    page_bytes = S * K * (D + E) * pages.k_PSKD.dtype.itemsize
    call = Call(
        spec=spec,
        scale=spec.scale_for(D),
        T=T,
        G=G,
        S=S,
        M=M,
        C=_block_pages(spec, S, M, page_bytes, K * row_tile * -(-R // row_tile)),
        N=num_splits,
        heads_first=heads_lie_first(K, pages.k_PSKD.dtype.itemsize),
        interpret=interpret,
    )
    q_BKRD = q_BTHD.reshape(B, T, K, G, D).transpose(0, 2, 1, 3, 4).reshape(B, K, R, D)
    q_BKRD = q_BKRD.astype(dtype)
    k, v = pages.k_PSKD, pages.v_PSKE
    if call.heads_first:
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    at_once = max(1, min(_MAX_ROWS, _TABLE_BYTES // (4 * M)))
    parts = []
    for b in range(0, B, at_once):
        tables, lengths = pages.tables_BM[b : b + at_once], pages.lengths_B[b : b + at_once]
        schedule = _schedule(call, tables, lengths)
        parts.append(run(call, schedule, q_BKRD[b : b + at_once], k, v, pages.k_scales))
    o_NBKRE, lse_NBKR = (jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))
    if pages.v_scales is not None:
        o_NBKRE = o_NBKRE * pages.v_scales[:, None, None]
    o, lse = o_NBKRE[0], lse_NBKR[0]
    for n in range(1, num_splits):
        o, lse = merge((o, lse), (o_NBKRE[n], lse_NBKR[n]))
    o_BTHE = o.reshape(B, K, T, G, E).transpose(0, 2, 1, 3, 4).reshape(B, T, H, E)
    return o_BTHE, lse.reshape(B, K, T, G).transpose(0, 2, 1, 3).reshape(B, T, H)


def _operand_dtype(q: jnp.dtype, pages: jnp.dtype) -> jnp.dtype:
    """Of the products: the wider of q and floating pages."""
    return q if pages.itemsize == 1 else jnp.promote_types(q, pages)


def _block_pages(spec: AttentionSpec, S: int, M: int, page_bytes: int, rows: int) -> int:
    """Pages of a block. `rows`: query rows of all key heads, as on-chip memory pads them."""
    if spec.block_kv is not None:
        C = min(spec.block_kv // S, M)
        size = max(C * page_bytes, 4 * C * S * rows)
        if size > _LARGEST_BLOCK_BYTES:
            raise ValueError(
                f"AttentionSpec.block_kv is {spec.block_kv}, of which keys, values or scores take "
                f"{size} bytes: decode backend 'tpu' takes blocks of {_LARGEST_BLOCK_BYTES}"
            )
        return C
    tokens = min(_BLOCK_TOKENS, _SCORE_BYTES // (4 * rows))
    return max(1, min(tokens // S, _BLOCK_BYTES // page_bytes, M))


def _schedule(call: Call, tables_BM: jax.Array, lengths_B: jax.Array) -> Schedule:
    """Who reads what, for every row and split: a few numbers a row, decided by the program."""
    live = live_pages(call.spec, lengths_B, call.T, call.S)
    blocks_B = -(-live.count // call.C)
    run_B = -(-blocks_B // call.N)
    first_NB = jnp.arange(call.N, dtype=jnp.int32)[:, None] * run_B
    blocks_NB = jnp.clip(blocks_B - first_NB, 0, run_B)
    before_NB = jnp.cumsum(blocks_NB, axis=1, dtype=jnp.int32) - blocks_NB
    B = lengths_B.shape[0]
    # The next row with work, B if there is none: its first block is fetched while this row ends.
    own_NB = jnp.where(blocks_NB > 0, jnp.arange(B, dtype=jnp.int32), B)
    next_NB = lax.cummin(own_NB, axis=1, reverse=True)[:, 1:]
    next_NB = jnp.pad(next_NB, ((0, 0), (0, 1)), constant_values=B)
    return Schedule(
        tables_BM.reshape(-1),
        lengths_B,
        *live,
        first_NB.reshape(-1),
        blocks_NB.reshape(-1),
        before_NB.reshape(-1),
        next_NB.reshape(-1),
    )
