"""What the three kernels do to one tile: scores in base 2, mask, columns out of rows.

A row statistic (position, segment, log-sum-exp, delta) lies in HBM as [1, block], O(tokens). A
kernel needs that of its fixed side down the sublanes; it turns it once a block into [block, 128],
every lane alike, from where wider tiles are free repetitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from memtrain_kernels.attention.blocks import Summary, full_tiles, live_tiles
from memtrain_kernels.attention.masks import visible
from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.attention.tpu.block_sizes import LANES
from memtrain_kernels.attention.tpu.tables import visit


LOG2_E = math.log2(math.e)
# A masked score: exp2 of it, less any real maximum, is 0, and its difference to itself is finite.
MASKED = -2.0e38

_CONTRACT_LAST = (((1,), (1,)), ((), ()))
_CONTRACT_FIRST = (((1,), (0,)), ((), ()))


class Scoring(NamedTuple):
    """scale: factor on q . k. soft_cap: as in AttentionSpec."""

    scale: float
    soft_cap: float | None


def dot(a: jax.Array, b: jax.Array, *, transpose_b: bool = False) -> jax.Array:
    """a @ b or a @ b.T with a float32 result; float32 operands are multiplied in full precision."""
    return lax.dot_general(
        a,
        b,
        _CONTRACT_LAST if transpose_b else _CONTRACT_FIRST,
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def scores(raw: jax.Array, scoring: Scoring) -> tuple[jax.Array, jax.Array | None]:
    """(scores in units of log 2, their derivative by scale * raw if it is not 1)."""
    if scoring.soft_cap is None:
        return raw * (scoring.scale * LOG2_E), None
    bent = jnp.tanh(raw * (scoring.scale / scoring.soft_cap))
    return bent * (scoring.soft_cap * LOG2_E), 1 - bent * bent


def wide(column: jax.Array, width: int) -> jax.Array:
    """[n, 128], every lane alike, as [n, width]."""
    if width <= LANES:
        return column[:, :width]
    return jnp.tile(column, (1, -(-width // LANES)))[:, :width]


def column(row: jax.Array) -> jax.Array:
    """[1, n] as [n, 128], every lane alike."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def row(column: jax.Array) -> jax.Array:
    """[n, 128], every lane alike, as [1, n]: the inverse of `column`."""
    return column.T[0:1, :]


def summary_of(words: Any) -> Summary:
    """A block's Summary, as scalars, out of its five words in scalar memory."""
    pos_min, pos_max, seg_min, seg_max, whole = (words[0, n] for n in range(5))
    return Summary(pos_min, pos_max, seg_min, seg_max, whole != 0)


def when_live(
    visited: jax.Array,
    q_summary: Any,
    kv_summary: Any,
    spec: AttentionSpec,
    step: Callable[[bool], None],
) -> None:
    """Run step(masked) on this grid step's tile, unless the mask empties it."""
    q, kv = summary_of(q_summary), summary_of(kv_summary)
    live = visited & live_tiles(spec, q, kv)
    full = full_tiles(spec, q, kv)

    @pl.when(live & full)
    def _full():
        step(False)

    @pl.when(live & ~full)
    def _partial():
        step(True)


def set_columns(scratch: Any, tokens: Any) -> None:
    """Positions and segments of a block, [2, block], into scratch [2, block, 128]."""
    for n in range(2):
        scratch[n] = column(tokens[n : n + 1, :])


def hidden(
    raw: jax.Array, spec: AttentionSpec, columns: Any, rows: Any, *, columns_are_queries: bool
) -> jax.Array:
    """raw [n, m] with the scores that the mask hides replaced; columns [2, n, 128], rows [2, m]."""
    positions, segments = (wide(columns[n], raw.shape[1]) for n in range(2))
    other_positions, other_segments = rows[0:1, :], rows[1:2, :]
    if columns_are_queries:
        seen = visible(spec, positions, other_positions, segments, other_segments)
    else:
        seen = visible(spec, other_positions, positions, other_segments, segments)
    return jnp.where(seen, raw, MASKED)


HeadOf = Callable[..., jax.Array]


def own_block(shape: tuple[int, int], head: HeadOf | None = None, **kwargs: Any) -> pl.BlockSpec:
    """A block of the row that a grid step works on: it stays through all its visits.

    The grid is (rows, ..., steps), with one table of ranges prefetched. `head` picks the block's
    head from the grid indices between; None: the array has no heads.
    """

    def index(own, *rest):
        *between, _step, _table = rest
        return (own, 0, 0) if head is None else (own, head(*between), 0, 0)

    return pl.BlockSpec((None, *(() if head is None else (None,)), *shape), index, **kwargs)


def other_block(shape: tuple[int, int], head: HeadOf | None = None, **kwargs: Any) -> pl.BlockSpec:
    """A block of the row that is visited at a grid step, as own_block."""

    def index(own, *rest):
        *between, step, table = rest
        other = visit(table, own, step)
        return (other, 0, 0) if head is None else (other, head(*between), 0, 0)

    return pl.BlockSpec((None, *(() if head is None else (None,)), *shape), index, **kwargs)


def result(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result, varying over the mesh axes that `like` varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def vmem_bytes(block_q: int, block_kv: int, row_bytes: int, tiles: int) -> int:
    """A bound on the on-chip memory of a kernel, to be given to the compiler.

    row_bytes: of all its blocks and scratch, for one token of the longer side. tiles: float32
    score tiles alive at once.
    """
    blocks = 2 * max(block_q, block_kv) * row_bytes
    return min(max(blocks + tiles * block_q * block_kv * 4, 32 * 2**20), 60 * 2**20)
