"""Pages and positions: which pages of a row hold a token that one of its queries may see."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memtrain_kernels.attention.spec import AttentionSpec


class Pages(NamedTuple):
    """A paged cache, as the backends take it.

    k_PSKD, v_PSKE: P pages of S slots, K key heads. tables_BM: page of a row's m-th S tokens.
    lengths_B: tokens of a row. k_scales, v_scales: float32 [K], [P, K], or None for float pages.
    """

    k_PSKD: jax.Array
    v_PSKE: jax.Array
    tables_BM: jax.Array
    lengths_B: jax.Array
    k_scales: jax.Array | None
    v_scales: jax.Array | None

    @property
    def page_size(self) -> int:
        return self.k_PSKD.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.k_PSKD.shape[2]


class Live(NamedTuple):
    """The pages of each row that must be read, numbered 0 .. count - 1 in order of position.

    They are the row's first `low` pages and, after a gap of `gap` pages, the rest up to its length.
    All int32 [B].
    """

    low: jax.Array
    gap: jax.Array
    count: jax.Array

    def to_page(self, index: jax.Array) -> jax.Array:
        """The place in the row's table of live page `index`; both [B, ...]."""
        low, gap = (x.reshape(x.shape + (1,) * (index.ndim - 1)) for x in (self.low, self.gap))
        return index + jnp.where(index >= low, gap, 0)


def live_pages(spec: AttentionSpec, lengths_B: jax.Array, T: int, page_size: int) -> Live:
    """The live pages of rows whose last T tokens ask, by window, sinks and prefix.

    Never leaves out a page with a visible token; mask_fn is not asked.
    """
    end = -(-lengths_B // page_size)
    if spec.window_left is None:
        zero = jnp.zeros_like(end)
        return Live(zero, zero, end)
    first_query = jnp.maximum(lengths_B - T, 0)
    first = jnp.maximum(first_query - (spec.window_left - 1), 0) // page_size
    low = jnp.minimum(-(-max(spec.sink_tokens, spec.prefix) // page_size), end)
    first = jnp.maximum(first, low)
    return Live(low, first - low, low + end - first)


def query_tokens(lengths_B: jax.Array, T: int) -> tuple[jax.Array, jax.Array]:
    """Positions and segments [B, T] of the last T tokens; a row shorter than T starts with padding.

    Padding is of segment -1, which sees nothing.
    """
    pos_BT = lengths_B[:, None] - T + jnp.arange(T, dtype=jnp.int32)
    return pos_BT, jnp.where(pos_BT >= 0, 0, -1)
