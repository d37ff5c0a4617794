"""What the kernels know of a call beside q, k and v: rows of tokens, their summaries, their ranges.

A *row* is one block of one batch entry's tokens, row b * n + i being block i of entry b: kernels
address blocks by row alone. All of it is O(tokens), and what a kernel holds in scalar memory is
four numbers a row that it works on, of which one call gets a bounded number.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memtrain_kernels.attention.blocks import Summary, live_tiles, pad_tokens, summarise
from memtrain_kernels.attention.spec import AttentionSpec


# Numbers a row in a table of ranges, rows in one table: 16 KiB of scalar memory.
WORDS = 4
MAX_ROWS = 1024


class Side(NamedTuple):
    """The tokens of one side, in R = B * n rows of `block`.

    tokens: positions and segments, int32 [R, 2, block]. summary: of each row, int32 [R, 1, 5] (the
    fields of blocks.Summary). blocks: the same as a Summary of [B, n].
    """

    tokens: jax.Array
    summary: jax.Array
    blocks: Summary


def make_side(pos: jax.Array, seg: jax.Array, batch: int, block: int) -> Side:
    """From int32 [B or 1, tokens]; the tail of the last row is padding that matches nothing."""
    pos, seg = pad_tokens(pos, 1, block), pad_tokens(seg, 1, block, fill=-1)
    shape = (batch, pos.shape[1])
    pos, seg = jnp.broadcast_to(pos, shape), jnp.broadcast_to(seg, shape)
    blocks = summarise(pos, seg, block)
    rows = blocks.pos_min.size
    tokens = jnp.stack([pos.reshape(rows, block), seg.reshape(rows, block)], axis=1)
    words = jnp.stack([field.astype(jnp.int32).reshape(rows) for field in blocks], axis=-1)
    return Side(tokens, words[:, None], blocks)


def to_rows(x_BTHD: jax.Array, block: int) -> jax.Array:
    """[B, T, H, D] as [B * n, H, block, D], padded with zeros."""
    x = pad_tokens(x_BTHD, 1, block)
    B, T, H, D = x.shape
    return x.reshape(B, T // block, block, H, D).swapaxes(2, 3).reshape(-1, H, block, D)


def from_rows(x_RHtD: jax.Array, batch: int, length: int) -> jax.Array:
    """The inverse of to_rows: [B, T, H, D]."""
    _, H, block, D = x_RHtD.shape
    x = x_RHtD.reshape(batch, -1, H, block, D).swapaxes(2, 3)
    return x.reshape(batch, -1, H, D)[:, :length]


def ranges(spec: AttentionSpec, q: Summary, kv: Summary, *, of_queries: bool) -> jax.Array:
    """Which rows of the other side each row has to visit: int32 [R, 4], R rows of queries or keys.

    The four numbers: the first row of the main range, the number of visits, the first row and the
    length of the head range. A visit goes through the head range, then the main one. The main range
    is what causal and window leave; sinks and a prefix add the head, if it stands apart, so that
    what lies between the two is not walked through. Within the ranges, summaries tell dead tiles.
    """
    tile_q = Summary(*(x[:, :, None] for x in q))
    tile_kv = Summary(*(x[:, None, :] for x in kv))
    axis = 2 if of_queries else 1
    live = live_tiles(spec, tile_q, tile_kv)
    near = live & live_tiles(replace(spec, sink_tokens=0, prefix=0), tile_q, tile_kv)
    first, last = _bounds(near, axis)
    head_first, head_last = _bounds(live & ~near, axis)
    apart = (first <= last) & (head_first <= head_last) & (head_last < first)
    head = jnp.where(apart, head_last - head_first + 1, 0)
    start = jnp.where(apart, first, jnp.minimum(first, head_first))
    stop = jnp.where(apart, last, jnp.maximum(last, head_last)) + 1
    visits = head + jnp.maximum(stop - start, 0)
    length = live.shape[axis]
    base = length * jnp.arange(live.shape[0], dtype=jnp.int32)[:, None]
    words = (
        base + jnp.minimum(start, length - 1),
        visits,
        base + jnp.where(apart, head_first, 0),
        head,
    )
    return jnp.stack([x.reshape(-1) for x in words], axis=-1)


def _bounds(tiles: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The first and last True along the axis; (length, -1) where there is none."""
    index = jax.lax.broadcasted_iota(jnp.int32, tiles.shape, axis)
    length = tiles.shape[axis]
    return (
        jnp.min(jnp.where(tiles, index, length), axis=axis),
        jnp.max(jnp.where(tiles, index, -1), axis=axis),
    )


def visit(table: jax.Array, row: jax.Array, step: jax.Array) -> jax.Array:
    """The row of the other side at this step; past the last visit, the last one's again.

    `table` is a flat one of `ranges`, in scalar memory.
    """
    start, visits, head_start, head = (table[row * WORDS + n] for n in range(WORDS))
    step = jnp.minimum(step, jnp.maximum(visits - 1, 0))
    return jnp.where(step < head, head_start + step, start + step - head)


def in_chunks(call, table: jax.Array, rows: tuple):
    """call(table chunk, steps, *rows chunk), over so few rows that the table stays small.

    `rows` are pytrees of arrays with R rows, as `table` and every result have. steps: the greatest
    number of visits in the chunk, at least 1.
    """

    def one(chunk):
        table, *rows = chunk
        steps = jnp.maximum(jnp.max(table[:, 1]), 1)
        return call(table.reshape(-1), steps, *rows)

    num_rows = table.shape[0]
    chunks = -(-num_rows // MAX_ROWS)
    if chunks == 1:
        return one((table, *rows))
    length = -(-num_rows // chunks)
    # A row of padding visits nothing.
    cut = jax.tree.map(
        lambda x: pad_tokens(x, 0, length).reshape(chunks, length, *x.shape[1:]), (table, *rows)
    )
    results = jax.lax.map(one, cut)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_rows], results)
