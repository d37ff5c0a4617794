"""What a decode backend serves: a table that each one declares, and that tests hold it to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.decode.paging import Pages


Scales = Literal["none", "head", "page"]


@dataclass(frozen=True)
class Problem:
    """One call without its numbers: B rows, T queries each, H and K heads.

    scales: those of keys and of values, none, one a key head, or one a page and head.
    """

    B: int
    T: int
    H: int
    K: int
    head_dim: int
    value_dim: int
    page_size: int
    max_pages: int
    dtype: str
    page_dtype: str
    scales: tuple[Scales, Scales]
    spec: AttentionSpec

    @classmethod
    def of(cls, q: jax.Array | jax.ShapeDtypeStruct, pages: Pages, spec: AttentionSpec) -> Problem:
        """The problem of arrays, or shapes."""
        B, T, H, D = q.shape
        _, S, K, E = pages.v_PSKE.shape
        scales = (_scales(pages.k_scales), _scales(pages.v_scales))
        dtypes = (q.dtype.name, pages.k_PSKD.dtype.name)
        return cls(B, T, H, K, D, E, S, pages.tables_BM.shape[1], *dtypes, scales, spec)


def _scales(scales: jax.Array | None) -> Scales:
    return "none" if scales is None else "head" if len(scales.shape) == 1 else "page"


@dataclass(frozen=True)
class Capabilities:
    """The table of one backend. None or True sets no limit.

    platform: the jax platform whose devices run it. device_kinds: parts of
    `jax.Device.device_kind`, one of which must occur. dtypes: of q. page_dtypes: of both caches.
    dims: of head_dim and value_dim, each on its own. max_queries: T. max_rows: T times the query
    heads, those of each key head rounded up to row_tile. page_multiple: page_size must be a
    multiple of it. max_page_bytes: keys and values of one page. max_table_bytes: the page numbers
    of one row, 4 bytes each. verified_on: the device kinds on which its numbers were checked
    against the oracle; "*" is every one.
    """

    name: str
    platform: str | None = None
    device_kinds: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    page_dtypes: tuple[str, ...] | None = None
    dims: tuple[int, ...] | None = None
    max_queries: int | None = None
    max_rows: int | None = None
    row_tile: int = 1
    page_multiple: int = 1
    max_page_bytes: int | None = None
    max_table_bytes: int | None = None
    page_scales: bool = True
    mask_fn: bool = True
    verified_on: tuple[str, ...] = ()

    def refusal(self, problem: Problem) -> str | None:
        """Why this backend cannot serve the problem, in words for people; None if it can."""
        return next(self._refusals(problem), None)

    def _refusals(self, p: Problem) -> Iterator[str]:
        for what, value, served in (
            ("q of", p.dtype, self.dtypes),
            ("pages of", p.page_dtype, self.page_dtypes),
            ("head_dim", p.head_dim, self.dims),
            ("value_dim", p.value_dim, self.dims),
        ):
            if served is not None and value not in served:
                yield f"{what} {value}: it takes {', '.join(map(str, served))}"
        rows = p.K * self.row_tile * -(-p.T * (p.H // p.K) // self.row_tile)
        itemsize = jnp.dtype(p.page_dtype).itemsize
        for what, value, most in (
            ("{} queries a row", p.T, self.max_queries),
            ("{} query rows of all key heads", rows, self.max_rows),
            (
                "pages of {} bytes",
                p.page_size * p.K * (p.head_dim + p.value_dim) * itemsize,
                self.max_page_bytes,
            ),
            ("a block table of {} bytes a row", 4 * p.max_pages, self.max_table_bytes),
        ):
            if most is not None and value > most:
                yield f"{what.format(value)}: it takes {most} at most"
        if p.page_size % self.page_multiple:
            yield f"page_size {p.page_size}: it takes multiples of {self.page_multiple}"
        if not self.page_scales and "page" in p.scales:
            yield "scales of each page: it takes one a key head"
        if not self.mask_fn and p.spec.mask_fn is not None:
            yield "a mask_fn: it takes none"
