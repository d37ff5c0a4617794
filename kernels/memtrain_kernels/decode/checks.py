"""What the arguments of paged_attention must be, said where they are not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from memtrain_kernels.attention.merge import Partial
from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.decode.paging import Pages
from memtrain_kernels.decode.quantize import QUANTIZED, is_quantized


IntArray = jax.Array | np.ndarray


def checked_pages(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: IntArray,
    lengths: IntArray,
    k_scales: jax.Array | None,
    v_scales: jax.Array | None,
) -> Pages:
    """The cache as backends take it: int32, lengths and page numbers in range, scales float32."""
    _check_arrays(q, k_pages, v_pages)
    tables_BM, lengths_B = _checked_rows(q.shape[0], k_pages, block_tables, lengths)
    scales = []
    for name, given, pages in (("k", k_scales, k_pages), ("v", v_scales, v_pages)):
        scales.append(_checked_scales(name, given, pages))
    return Pages(k_pages, v_pages, tables_BM, lengths_B, *scales)


def check_extras(
    q: jax.Array,
    pages: Pages,
    spec: AttentionSpec,
    sink_logits: jax.Array | None,
    prior: Partial | None,
    num_splits: int | None,
) -> None:
    """The arguments beside q and the cache."""
    B, T, H, _ = q.shape
    E = pages.v_PSKE.shape[3]
    if spec.ordered or spec.block_q is not None:
        raise ValueError(
            f"AttentionSpec has ordered={spec.ordered}, block_q={spec.block_q}: leave both out, "
            "decoding takes few queries against many keys"
        )
    if spec.block_kv is not None and spec.block_kv % pages.page_size:
        raise ValueError(
            f"AttentionSpec.block_kv is {spec.block_kv}: give a multiple of the page_size "
            f"{pages.page_size}"
        )
    if sink_logits is not None and sink_logits.shape != (H,):
        raise ValueError(f"sink_logits has shape {sink_logits.shape}: give one logit a head, [{H}]")
    if prior is not None and (prior[0].shape, prior[1].shape) != ((B, T, H, E), (B, T, H)):
        raise ValueError(
            f"prior has shapes o {prior[0].shape}, lse {prior[1].shape}: "
            f"give o [{B}, {T}, {H}, {E}] and lse [{B}, {T}, {H}]"
        )
    if num_splits is not None and (
        not isinstance(num_splits, int) or isinstance(num_splits, bool) or num_splits < 1
    ):
        raise ValueError(f"num_splits is {num_splits!r}: give an int >= 1, or None")


def _check_arrays(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array) -> None:
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q has shape {q.shape}: give [batch, queries, heads, head_dim]")
    if not _is_floating(q.dtype):
        raise ValueError(f"q has dtype {q.dtype}: give float32, bfloat16 or float16")
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if pages.ndim != 4 or 0 in pages.shape:
            raise ValueError(
                f"{name} has shape {pages.shape}: give [pages, page_size, kv_heads, dim]"
            )
        if not (_is_floating(pages.dtype) or is_quantized(pages.dtype)):
            raise ValueError(
                f"{name} has dtype {pages.dtype}: give float32, bfloat16, float16, "
                f"{' or '.join(QUANTIZED)}"
            )
    if k_pages.dtype != v_pages.dtype:
        raise ValueError(
            f"k_pages, v_pages have dtypes {k_pages.dtype}, {v_pages.dtype}: give one dtype"
        )
    H, D = q.shape[2:]
    if k_pages.shape[3] != D:
        raise ValueError(f"k_pages has head_dim {k_pages.shape[3]} and q {D}: give one head_dim")
    if v_pages.shape[:3] != k_pages.shape[:3]:
        raise ValueError(
            f"v_pages has shape {v_pages.shape}: for k_pages {k_pages.shape} "
            f"give {[*k_pages.shape[:3], 'any']}"
        )
    if H % k_pages.shape[2]:
        raise ValueError(
            f"q has {H} heads and k_pages {k_pages.shape[2]}: "
            "query heads must be a multiple of key heads"
        )


def _checked_rows(
    B: int, k_pages: jax.Array, block_tables: IntArray, lengths: IntArray
) -> tuple[jax.Array, jax.Array]:
    P, S = k_pages.shape[:2]
    for name, array in (("block_tables", block_tables), ("lengths", lengths)):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} has dtype {array.dtype}: give int32")
    if block_tables.ndim != 2 or block_tables.shape[0] != B or block_tables.shape[1] == 0:
        raise ValueError(f"block_tables has shape {block_tables.shape}: give [{B}, max_pages]")
    if lengths.shape != (B,):
        raise ValueError(f"lengths has shape {lengths.shape}: give [{B}]")
    M = block_tables.shape[1]
    if _is_known(lengths):
        n = np.asarray(lengths)
        if n.min() < 0 or n.max() > M * S:
            raise ValueError(
                f"lengths are {n.min()} to {n.max()}: give 0 to {M * S}, "
                f"what {M} pages of {S} tokens hold"
            )
        if _is_known(block_tables):
            page = np.asarray(block_tables)[np.arange(M) * S < n[:, None]]
            if page.size and (page.min() < 0 or page.max() >= P):
                raise ValueError(
                    f"block_tables name the pages {page.min()} to {page.max()} within lengths: "
                    f"give 0 to {P - 1}, there are {P} pages"
                )
    return (
        jnp.clip(jnp.asarray(block_tables, jnp.int32), 0, P - 1),
        jnp.clip(jnp.asarray(lengths, jnp.int32), 0, M * S),
    )


def _checked_scales(name: str, scales: jax.Array | None, pages: jax.Array) -> jax.Array | None:
    P, _, K, _ = pages.shape
    if not is_quantized(pages.dtype):
        if scales is not None:
            raise ValueError(
                f"{name}_scales are given and {name}_pages have dtype {pages.dtype}: "
                f"scales belong to {' and '.join(QUANTIZED)}"
            )
        return None
    if scales is None:
        raise ValueError(
            f"{name}_pages have dtype {pages.dtype} and {name}_scales are missing: "
            f"give [{K}] or [{P}, {K}]"
        )
    if scales.shape not in ((K,), (P, K)):
        raise ValueError(f"{name}_scales has shape {scales.shape}: give [{K}] or [{P}, {K}]")
    if not _is_floating(scales.dtype):
        raise ValueError(f"{name}_scales has dtype {scales.dtype}: give float32")
    if _is_known(scales) and not np.isfinite(np.asarray(scales, np.float32)).all():
        raise ValueError(f"{name}_scales holds a NaN or an infinity: give finite scales")
    return jnp.asarray(scales, jnp.float32)


def _is_floating(dtype: jnp.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1


def _is_known(array: IntArray) -> bool:
    """Whether the numbers can be looked at now: outside of jit."""
    if isinstance(array, Tracer):
        return False
    return isinstance(array, np.ndarray) or array.is_fully_addressable
