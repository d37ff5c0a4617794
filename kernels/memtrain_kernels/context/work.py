"""How much of the score matrix each device of a ring computes, and what it is sent for it."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from memtrain_kernels.attention.blocks import Summary, live_tiles, summarise
from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.context.api import plan_ring
from memtrain_kernels.context.layout import Layout
from memtrain_kernels.context.schedule import carriers


@dataclass(frozen=True)
class RingWork:
    """Work of one ring over n devices, in tiles of block_q x block_kv tokens.

    tiles: of each device, those that hold a visible pair. ideal: as many as one device would
    compute for the whole sequence, divided by n. hops: permutes after the first round. sent: of
    each device, the keys that it sends or passes on, in tokens.
    """

    tiles: tuple[int, ...]
    ideal: float
    hops: int
    sent: tuple[int, ...]

    @property
    def slowest(self) -> float:
        """The busiest device's tiles over the ideal: 1 is perfect balance and nothing wasted."""
        return max(self.tiles) / self.ideal


def ring_work(
    spec: AttentionSpec,
    layout: Layout,
    length: int,
    *,
    block_q: int,
    block_kv: int,
    positions: np.ndarray | None = None,
    segments: np.ndarray | None = None,
) -> RingWork:
    """The work of a ring of a row of `length` tokens.

    positions, segments: int32 [length] in natural order; by default 0, 1, 2, ... and one segment.
    Tiles are those that every backend skips or computes by the summaries of blocks. Sinks that are
    gathered apart are not counted. Raises ValueError for blocks that do not divide the stretches.
    """
    layout.check(length)
    n, local = layout.devices, length // layout.devices
    piece = local // layout.pieces
    if piece % block_kv or local % block_q:  # then length is a multiple of both, too
        raise ValueError(
            f"blocks of {block_q} x {block_kv} tokens: {local} tokens of a device, in stretches of "
            f"{piece}, are not counted in whole ones"
        )
    by_default = positions is None
    pos = np.arange(length, dtype=np.int32) if positions is None else np.asarray(positions)
    seg = np.zeros(length, np.int32) if segments is None else np.asarray(segments)
    schedule, _ = plan_ring(
        spec, layout, local, local, by_default=by_default, segments=segments is not None
    )
    order = np.concatenate([layout.indices(rank, local) for rank in range(n)])
    live = _live(spec, pos[order], seg[order], block_q, block_kv)
    # Of queries of device i and keys of stretch s of device j: [i, j, s].
    by_stretch = live.reshape(n, local // block_q, n, layout.pieces, -1).sum((1, 4))
    tiles = np.where(schedule.visited(layout.pieces), by_stretch, 0).sum((1, 2))
    sent = [0] * n
    for chain in schedule.chains:
        for at, (hop, held) in enumerate(zip(chain, carriers(chain, n), strict=True)):
            step = hop.displacement - (chain[at - 1].displacement if at else 0)
            for i in held:
                sent[(i - step) % n] += (schedule.tail or piece) * len(hop.pieces)
    ideal = _live(spec, pos, seg, block_q, block_kv).sum() / n
    return RingWork(tuple(map(int, tiles)), float(ideal), schedule.hops, tuple(sent))


def _live(
    spec: AttentionSpec, pos: np.ndarray, seg: np.ndarray, block_q: int, block_kv: int
) -> np.ndarray:
    """Which tiles of [tokens / block_q, tokens / block_kv] hold a visible pair."""
    tokens = jnp.asarray(pos)[None], jnp.asarray(seg)[None]
    q, kv = (summarise(*tokens, block) for block in (block_q, block_kv))
    q, kv = Summary(*(x[0, :, None] for x in q)), Summary(*(x[0, None, :] for x in kv))
    return np.asarray(live_tiles(spec, q, kv))
