"""The public function of decoding: checks its arguments, picks the backend, joins the results."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, overload

import jax
import numpy as np

from memtrain_kernels.attention.merge import Partial, join_sink_logits, merge
from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.decode.backends import attend_with, record, resolve_backend
from memtrain_kernels.decode.capabilities import Problem
from memtrain_kernels.decode.checks import check_extras, checked_pages
from memtrain_kernels.decode.paging import Pages


IntArray = jax.Array | np.ndarray


@overload
def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: IntArray,
    lengths: IntArray,
    *,
    spec: AttentionSpec = ...,
    k_scales: jax.Array | None = ...,
    v_scales: jax.Array | None = ...,
    sink_logits: jax.Array | None = ...,
    prior: Partial | None = ...,
    num_splits: int | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> jax.Array: ...
@overload
def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: IntArray,
    lengths: IntArray,
    *,
    spec: AttentionSpec = ...,
    k_scales: jax.Array | None = ...,
    v_scales: jax.Array | None = ...,
    sink_logits: jax.Array | None = ...,
    prior: Partial | None = ...,
    num_splits: int | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> Partial: ...
def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: IntArray,
    lengths: IntArray,
    *,
    spec: AttentionSpec = AttentionSpec(),  # noqa: B008 (frozen)
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
    sink_logits: jax.Array | None = None,
    prior: Partial | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> jax.Array | Partial:
    """Attention of the last tokens of each row over a paged KV cache: decoding.

    q [B, T, H, D]: the last T of the row's tokens, one, or a few that were guessed ahead. Their
    keys and values are in the pages already, so query t of row b stands at position
    lengths[b] - T + t and sees itself.
    k_pages [P, page_size, Hkv, D], v_pages [P, page_size, Hkv, Dv], H a multiple of Hkv (query head
    h reads key head h // (H / Hkv)). block_tables int32 [B, max_pages], lengths int32 [B]: token i
    of row b lies in page block_tables[b, i // page_size], slot i % page_size, and its position is
    i. Entries beyond the length may be any number and slots beyond it hold anything: neither
    changes a result. Length 0 is an empty row; a row shorter than T has its first queries before
    its first token, where they see nothing.

    Pages are floating, or int8 or float8_e4m3fn with k_scales and v_scales (`quantize_pages`):
    stored value times scale, a scale for each key head [Hkv], or for each page and head [P, Hkv].
    spec: positions are as above and segments one, so `ordered` and `block_q` have no meaning here;
    block_kv is the tokens of a block of pages. prior, sink_logits: as in `attention`.
    num_splits: runs into which a row's pages are cut, to be worked on side by side; None lets the
    backend choose. It changes results by rounding alone. Pages that no query sees by length,
    window, sink_tokens and prefix are not read (`reference` reads them).

    Returns out [B, T, H, Dv] in q's dtype and, on request, lse [B, T, H] in float32: the log of the
    whole denominator (prior and sink logits included), to be joined by `merge`. A query that sees
    nothing has out exactly 0 and lse -inf. Scores, softmax and sums are float32 whatever the
    inputs; products take q's dtype, or the wider one of q and floating pages.

    backend: "xla" (any device), "reference" (dense; differentiable to any order), "tpu" (what its
    table says), or None to choose. Raises ValueError for shapes, dtypes or backends that do not
    fit, and for scales, lengths or page numbers that cannot be, where they are known before the
    program runs; inside jit a length is cut to the table's and a page number to the pool's.
    """
    pages = checked_pages(q, k_pages, v_pages, block_tables, lengths, k_scales, v_scales)
    check_extras(q, pages, spec, sink_logits, prior, num_splits)
    name, reason = resolve_backend(backend, Problem.of(q, pages, spec))
    record(name, reason)
    attend = attend_with(name) if name == "reference" else _without_gradient(name)
    o, lse = attend(q, pages, spec, num_splits)
    if prior is not None:
        o, lse = merge((o, lse), (prior[0].astype(o.dtype), prior[1].astype(lse.dtype)))
    if sink_logits is not None:
        o, lse = join_sink_logits((o, lse), sink_logits)
    out = o.astype(q.dtype)
    return (out, lse) if return_lse else out


def _without_gradient(name: str) -> Callable[..., Partial]:
    """The backend's function; who asks for its derivative learns where to get one."""

    @functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
    def attend(q: jax.Array, pages: Pages, spec: AttentionSpec, num_splits: int | None) -> Partial:
        return attend_with(name)(q, pages, spec, num_splits)

    @attend.defjvp
    def _(spec, num_splits, primals, tangents):
        raise NotImplementedError(
            f"decode backend {name!r} has no derivative: use backend='reference', or attention"
        )

    return attend
