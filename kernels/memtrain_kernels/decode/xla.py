"""Paged decoding in plain XLA, on any device: a loop over blocks of pages, split over the length.

A row's live pages are cut into N splits, which are worked on side by side, a block of pages a step:
one gather of that block, one step of a running softmax. The partial results are joined in the order
of the splits. The whole cache of a row never exists side by side.

Split over the KV length: Flash-Decoding (Dao et al. 2023). Pages: vLLM (arXiv 2309.06180).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memtrain_kernels.attention.masks import visible
from memtrain_kernels.attention.merge import merge
from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.decode.capabilities import Capabilities
from memtrain_kernels.decode.paging import Live, Pages, live_pages, query_tokens
from memtrain_kernels.target import current_target


CAPABILITIES = Capabilities("xla", verified_on=("*",))
"""Serves everything, everywhere: plain jnp, held to a float64 oracle by the tests."""

# Keys and values of one step, all rows and splits together. On CPU, measured: what its cache holds
# (a block of 256 tokens of 4 rows, 8 heads of 128, in float32). Elsewhere not measured.
_STEP_BYTES = {"cpu": 8 * 2**20, "other": 64 * 2**20}
_STEP_TOKENS = (32, 2048)  # least and most tokens of a split's block
# Off the CPU so few rows would leave most of a device idle: splits make up for them.
_ROWS_AT_ONCE = 16


def attend(
    q_BTHD: jax.Array, pages: Pages, spec: AttentionSpec, num_splits: int | None
) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, E] and lse [B, T, H] in the accumulation dtype.

    num_splits: None is one on CPU, whose products use every core, and elsewhere more for few rows.
    """
    B, _, _, D = q_BTHD.shape
    S, K, E = pages.v_PSKE.shape[1:]
    M = pages.tables_BM.shape[1]
    on_cpu = current_target().platform == "cpu"
    splits = min(num_splits or (1 if on_cpu else -(-_ROWS_AT_ONCE // B)), M)
    tokens = spec.block_kv
    if tokens is None:
        row_bytes = K * (D + E) * _operand_dtype(q_BTHD, pages).itemsize
        fitting = _STEP_BYTES["cpu" if on_cpu else "other"] // (B * splits * row_bytes)
        tokens = min(max(fitting, _STEP_TOKENS[0]), _STEP_TOKENS[1])
    return _attend(q_BTHD, pages, spec, splits, min(max(tokens // S, 1), M))


class _Block(NamedTuple):
    """A block of pages of every row and split: their numbers, positions, and what is shown."""

    page_BNC: jax.Array
    pos_BNX: jax.Array
    shown_BNX: jax.Array


class _Running(NamedTuple):
    """A softmax under way: greatest score and total of exponentials [.., R, 1], acc [.., R, E]."""

    m: jax.Array
    total: jax.Array
    acc: jax.Array


@functools.partial(jax.jit, static_argnames=("spec", "N", "C"))
def _attend(
    q_BTHD: jax.Array, pages: Pages, spec: AttentionSpec, N: int, C: int
) -> tuple[jax.Array, jax.Array]:
    """N splits, C pages of a block, S slots of a page, X = C * S tokens, R = T * G query rows."""
    B, T, H, D = q_BTHD.shape
    S, K, E = pages.v_PSKE.shape[1:]
    G = H // K
    dtype = _operand_dtype(q_BTHD, pages)
    acc_dtype = jnp.promote_types(dtype, jnp.float32)
    live = live_pages(spec, pages.lengths_B, T, S)
    steps_B = -(-live.count // (C * N))  # blocks of one split
    q_pos_BT, q_seg_BT = query_tokens(pages.lengths_B, T)
    q_BKRD = q_BTHD.reshape(B, T, K, G, D).transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, D)
    q_BKRD = q_BKRD.astype(dtype)

    def seen(block: _Block) -> jax.Array:
        seen_BNTX = visible(
            spec,
            q_pos_BT[:, None, :, None],
            block.pos_BNX[:, :, None],
            q_seg_BT[:, None, :, None],
            jnp.where(block.shown_BNX, 0, -1)[:, :, None],
        )
        return jnp.repeat(seen_BNTX, G, axis=2)[:, :, None]

    def step(j: jax.Array, running: _Running) -> _Running:
        block = _block(pages, live, steps_B, j, N, C)
        # Heads come forward while pages are gathered: one pass, and the products want them there.
        k_BNKXD = _heads_first(pages.k_PSKD[block.page_BNC]).astype(dtype)
        v_BNKXE = _heads_first(pages.v_PSKE[block.page_BNC]).astype(dtype)
        # What is not shown may be anything, and 0 times NaN is NaN.
        v_BNKXE = jnp.where(block.shown_BNX[:, :, None, :, None], v_BNKXE, 0)
        s = jnp.einsum("bkrd,bnkxd->bnkrx", q_BKRD, k_BNKXD, preferred_element_type=acc_dtype)
        s = s * spec.scale_for(D)
        if pages.k_scales is not None:
            s = s * _per_token(pages.k_scales, block, S).astype(acc_dtype)
        if spec.soft_cap is not None:
            s = spec.soft_cap * jnp.tanh(s / spec.soft_cap)
        s = jnp.where(seen(block), s, -jnp.inf)
        m = jnp.maximum(running.m, jnp.max(s, axis=-1, keepdims=True))
        shift = jnp.where(m == -jnp.inf, 0, m)
        p, fade = jnp.exp(s - shift), jnp.exp(running.m - shift)
        total = running.total * fade + jnp.sum(p, axis=-1, keepdims=True)
        if pages.v_scales is not None and pages.v_scales.ndim == 2:
            p = p * _per_token(pages.v_scales, block, S).astype(acc_dtype)
        o = jnp.einsum(
            "bnkrx,bnkxe->bnkre", p.astype(dtype), v_BNKXE, preferred_element_type=acc_dtype
        )
        return _Running(m, total, running.acc * fade + o)

    rows = (B, N, K, T * G)
    start = _Running(
        jnp.full((*rows, 1), -jnp.inf, acc_dtype),
        jnp.zeros((*rows, 1), acc_dtype),
        jnp.zeros((*rows, E), acc_dtype),
    )
    m, total, acc = lax.fori_loop(0, jnp.max(steps_B), step, start)
    total = jnp.maximum(total, 1)  # the greatest score adds 1, so less says that nothing was seen
    o_BNKRE, lse_BNKR = acc / total, (m + jnp.log(total))[..., 0]
    if pages.v_scales is not None and pages.v_scales.ndim == 1:
        o_BNKRE = o_BNKRE * pages.v_scales.astype(acc_dtype)[:, None, None]
    o, lse = o_BNKRE[:, 0], lse_BNKR[:, 0]
    for n in range(1, N):
        o, lse = merge((o, lse), (o_BNKRE[:, n], lse_BNKR[:, n]))
    o_BTHE = o.reshape(B, K, T, G, E).transpose(0, 2, 1, 3, 4).reshape(B, T, H, E)
    return o_BTHE, lse.reshape(B, K, T, G).transpose(0, 2, 1, 3).reshape(B, T, H)


def _block(pages: Pages, live: Live, steps_B: jax.Array, j: jax.Array, N: int, C: int) -> _Block:
    """The j-th block of each row and split. Rows and splits that have ended show nothing."""
    S = pages.page_size
    first_BN = jnp.arange(N, dtype=jnp.int32) * steps_B[:, None] + j
    index_BNC = first_BN[..., None] * C + jnp.arange(C, dtype=jnp.int32)
    held_BNC = (index_BNC < live.count[:, None, None]) & (j < steps_B)[:, None, None]
    place_BNC = jnp.where(held_BNC, live.to_page(index_BNC), 0)
    B = place_BNC.shape[0]
    page_BNC = jnp.take_along_axis(pages.tables_BM, place_BNC.reshape(B, -1), axis=1)
    # An entry that is not held is no page number: page 0 stands in for it, unseen.
    page_BNC = jnp.where(held_BNC, page_BNC.reshape(place_BNC.shape), 0)
    pos_BNX = (place_BNC[..., None] * S + jnp.arange(S, dtype=jnp.int32)).reshape(B, N, C * S)
    shown_BNX = jnp.repeat(held_BNC, S, axis=2) & (pos_BNX < pages.lengths_B[:, None, None])
    return _Block(page_BNC, pos_BNX, shown_BNX)


def _operand_dtype(q: jax.Array, pages: Pages) -> jnp.dtype:
    """Of the products: q's, or the wider of q and floating pages. It holds every 8-bit value."""
    return q.dtype if pages.k_scales is not None else jnp.promote_types(q.dtype, pages.k_PSKD.dtype)


def _heads_first(x_BNCSKD: jax.Array) -> jax.Array:
    """[B, N, C, S, K, D] to [B, N, K, C * S, D]."""
    B, N, C, S, K, D = x_BNCSKD.shape
    return x_BNCSKD.transpose(0, 1, 4, 2, 3, 5).reshape(B, N, K, C * S, D)


def _per_token(scales: jax.Array, block: _Block, S: int) -> jax.Array:
    """Scales as scores take them: [K, 1, 1] from [K], or [B, N, K, 1, X] from [P, K]."""
    if scales.ndim == 1:
        return scales[:, None, None]
    # The page that stands in for none may have a scale of which nothing is known.
    x_BNXK = jnp.repeat(scales[block.page_BNC], S, axis=2)
    x_BNXK = jnp.where(block.shown_BNX[..., None], x_BNXK, 1)
    return x_BNXK.transpose(0, 1, 3, 2)[:, :, :, None]
