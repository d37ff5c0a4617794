"""Which tiles a split reads, in which order, and from which pages: shared by kernel and twin.

A row's live tokens (those of the pages of `live_pages`: sinks and prefix first, then the window)
are numbered without the gap between them and cut into tiles of 64; splits are runs of tiles. All is
O(rows x splits), decided in XLA before the kernel starts; the kernel reads seven numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memtrain_kernels.attention.hopper.schedule import Summary, full
from memtrain_kernels.decode.hopper.plan import TILE, Plan
from memtrain_kernels.decode.paging import Pages, live_pages


# A split's numbers are padded to this many, so that each starts on a 32-byte sector.
_WIDTH = 8


class Run(NamedTuple):
    """The work of one split: int32 scalars, or arrays [B, splits].

    first, count: its tiles. low, gap: the live tokens before the gap, and the tokens left out
    there. length: of the row. last: the row's last live page.
    """

    first: Any
    count: Any
    low: Any
    gap: Any
    length: Any
    last: Any


def make_runs(plan: Plan, pages: Pages) -> jax.Array:
    """The runs of every split, int32 [B, splits, 8].

    All runs are equally long but for each row's last one: rows are of many lengths, and the
    longest run decides when the device is done.
    """
    live = live_pages(plan.spec, pages.lengths_B, plan.T, plan.S)
    low, gap = live.low * plan.S, live.gap * plan.S
    tiles = -(-(pages.lengths_B - gap) // TILE)
    run = jnp.maximum(-(-jnp.max(tiles) // plan.splits), 1)
    first = jnp.minimum(jnp.arange(plan.splits, dtype=jnp.int32) * run, tiles[:, None])
    count = jnp.minimum(tiles[:, None] - first, run)
    of_row = (low, gap, pages.lengths_B, live.count - 1)
    numbers = [first, count, *(jnp.broadcast_to(x[:, None], first.shape) for x in of_row)]
    numbers = jnp.stack(numbers, axis=-1).astype(jnp.int32)
    return jnp.pad(numbers, ((0, 0), (0, 0), (0, _WIDTH - numbers.shape[2])))


def read_run(runs, b, n) -> Run:
    """The run of split n of row b, from the table (an array or a kernel's ref)."""
    return Run(*(runs[b, n, i] for i in range(len(Run._fields))))


def page_place(plan: Plan, run: Run, tile, copy: int):
    """Where in the row's block table the page of a tile's copy-th piece stands.

    Pieces beyond the row's last page are that page again: its tokens there are masked.
    """
    if plan.tiles_per_page > 1:
        index = quotient(tile, plan.tiles_per_page)
    else:
        index = jnp.minimum(tile * plan.pages_per_tile + copy, run.last)
    return index + jnp.where(index * plan.S >= run.low, quotient(run.gap, plan.S), 0)


def page_slot(plan: Plan, tile):
    """The first slot that a tile reads of its page."""
    if plan.tiles_per_page == 1:
        return 0
    return (tile - quotient(tile, plan.tiles_per_page) * plan.tiles_per_page) * TILE


def page_numbers(plan: Plan, run: Run, tables, b, i) -> tuple[Any, ...]:
    """The pages of a run's i-th tile, one for each copy; of a tile that is no more, any pages.

    tables: an array or a kernel's ref.
    """
    places = (page_place(plan, run, run.first + i, c) for c in range(plan.pages_per_tile))
    # Beyond the run the table may end, and what stands there need not be the number of a page.
    numbers = (tables[b, jnp.clip(place, 0, plan.M - 1)] for place in places)
    return tuple(jnp.clip(number, 0, plan.P - 1) for number in numbers)


def page_scales(plan: Plan, numbers: tuple[Any, ...], head, *scales) -> tuple[Any, Any]:
    """Numbers to multiply with the products and with the exponentials of a tile of these pages.

    scales: of keys and values, [K] or [P, K], as arrays or a kernel's refs. Returns two tuples:
    one number, or one for each of the tile's pages, or none, where there is nothing to multiply
    (values' scales of a whole head are applied at the end).
    """
    k, v = (), ()
    if plan.k_scales == "head":
        k = (scales[0][head],)
    elif plan.k_scales == "page":
        k = tuple(scales[0][number, head] for number in numbers)
    if plan.v_scales == "page":
        v = tuple(scales[1][number, head] for number in numbers)
    return k, v


def key_positions(run: Run, tile, offset):
    """Positions of a tile's tokens, by their number in it; not below the length: no tokens."""
    index = tile * TILE + offset
    return index + jnp.where(index >= run.low, run.gap, 0)


def is_ragged(run: Run, tile):
    """Whether a tile goes beyond the row's last token."""
    return (tile + 1) * TILE > run.length - run.gap


def is_full(plan: Plan, run: Run, tile):
    """Whether every query sees every token of a tile; never True where one does not."""
    zero = jnp.int32(0)
    first, last = key_positions(run, tile, 0), key_positions(run, tile, TILE - 1)
    q = Summary(run.length - plan.T, run.length - 1, zero, zero, _one_if(run.length >= plan.T))
    kv = Summary(first, last, zero, zero, _one_if(~is_ragged(run, tile)))
    return full(plan.spec, q, kv)


def quotient(x, n: int):
    """x // n of numbers that are not negative, without the code for those that are."""
    return lax.div(x, jnp.int32(n) if jnp.ndim(x) == 0 else jnp.full_like(x, n))


def _one_if(truth):
    return jnp.where(truth, jnp.int32(1), jnp.int32(0))
