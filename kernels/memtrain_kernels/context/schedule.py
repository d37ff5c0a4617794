"""The hops of a ring: which keys have to travel where, as far as indices tell.

Device i works on the keys of device i - d at the hop of displacement d. A hop that the mask empties
for every device is left out; where only one of a device's two stretches is seen by anybody, only
that one travels; and a device that nobody behind it waits for passes nothing on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.context.layout import Layout


@dataclass(frozen=True)
class Hop:
    """One hop. displacement: in -n..n, the sign being the direction of travel. pieces: of the
    sender's stretches, those that travel. receivers: devices that may see something of them.
    """

    displacement: int
    pieces: tuple[int, ...]
    receivers: tuple[int, ...]


@dataclass(frozen=True)
class Schedule:
    """The hops after the first, in which every device works on its own keys.

    chains: hops in the order of travel, away from home: forward ones, then backward ones.
    complete: every device meets all keys of all others. tail: of every stretch that travels, its
    last tokens, as many as a window reaches back; None is all of it.
    """

    devices: int
    chains: tuple[tuple[Hop, ...], ...]
    complete: bool
    tail: int | None = None

    @property
    def hops(self) -> int:
        """Hops in which keys are sent; the first, on the device's own, is not counted."""
        return sum(len(chain) for chain in self.chains)

    def visited(self, pieces: int) -> np.ndarray:
        """Whether device i meets piece s of device j: bool [i, j, s]."""
        n = self.devices
        met = np.zeros((n, n, pieces), bool)
        met[np.arange(n), np.arange(n)] = True
        for hop in (hop for chain in self.chains for hop in chain):
            for i in hop.receivers:
                met[i, (i - hop.displacement) % n, list(hop.pieces)] = True
        return met


@functools.cache
def make_schedule(
    spec: AttentionSpec, layout: Layout, q_local: int, kv_local: int, by_index: bool
) -> Schedule:
    """The schedule of one call; sink tokens are not counted, they are gathered apart.

    by_index: natural indices rank the tokens of a document, by default or by promise, so that
    causal and window rules can be told from them. Otherwise every device meets everything.
    """
    n, pieces = layout.devices, layout.pieces
    q_runs = [layout.runs(i, q_local) for i in range(n)]
    kv_runs = [layout.runs(j, kv_local) for j in range(n)]
    period = n * layout.stripe if layout.kind == "striped" else 1
    low, high = _differences(spec) if by_index else (-math.inf, math.inf)

    @functools.cache
    def sees(i: int, j: int, s: int) -> bool:
        kv = kv_runs[j][s]
        if by_index and spec.prefix and kv.start < spec.prefix:
            return True
        return any(
            _meets(q.start - kv[-1], q[-1] - kv.start, low, high, period, layout.stripe)
            for q in q_runs[i]
        )

    trims = by_index and spec.causal and not spec.prefix and layout.kind != "striped"
    tail = 0 if trims else kv_local
    needed: dict[int, tuple[set[int], set[int]]] = {}
    for d in range(1, n):
        found = [(i, s) for i in range(n) for s in range(pieces) if sees(i, (i - d) % n, s)]
        if found:
            needed[d] = ({s for _, s in found}, {i for i, _ in found})
        for i, s in found if trims else ():
            kv = kv_runs[(i - d) % n][s]
            # Queries of a stretch before this one see nothing of it.
            first = min(q.start for q in q_runs[i] if q.start > kv[-1])
            tail = max(
                tail, kv[-1] + 1 - max(kv.start, math.floor(first - min(high, n * kv_local)))
            )
    complete = len(needed) == n - 1 and all(len(i) == n for _, i in needed.values())
    forward, backward = _directions(needed, n)
    chains = []
    for signs, group in ((1, forward), (-1, backward)):
        hops = [
            Hop(
                d if signs > 0 else d - n,
                tuple(sorted(_travelling(needed, group, at))),
                tuple(sorted(needed[d][1])),
            )
            for at, d in enumerate(group)
        ]
        if hops:
            chains.append(tuple(hops))
    shorter = tail < kv_local // pieces
    return Schedule(n, tuple(chains), complete, tail if shorter else None)


def _differences(spec: AttentionSpec) -> tuple[float, float]:
    """The least and greatest q - kv index that causal and window leave."""
    right = 1 if spec.causal else spec.window_right
    low = -math.inf if right is None else -(right - 1)
    high = math.inf if spec.window_left is None else spec.window_left - 1
    return low, high


def _meets(least: int, most: int, low: float, high: float, period: int, stripe: int) -> bool:
    """Whether some pair of a run of queries and one of keys differs by low..high.

    In a striped layout, runs have gaps: differences lie within `stripe` of a multiple of the period
    from the one between the runs' starts.
    """
    a, b = max(least, low), min(most, high)
    if a > b:
        return False
    if period == 1 or b - a >= period:
        return True
    # The starts' difference modulo the period, plus or minus less than a stripe.
    base = (least + stripe - 1) % period if stripe > 1 else least % period
    nearest = [
        base + period * k
        for k in range(math.floor((a - base) / period) - 1, math.ceil((b - base) / period) + 2)
    ]
    return any(x - (stripe - 1) <= b and x + (stripe - 1) >= a for x in nearest)


def _directions(needed: Collection[int], n: int) -> tuple[list[int], list[int]]:
    """Displacements that travel forward, and those that are nearer the other way round."""
    if len(needed) == n - 1:
        return sorted(needed), []
    return (
        sorted(d for d in needed if 2 * d <= n),
        sorted((d for d in needed if 2 * d > n), reverse=True),
    )


def _travelling(
    needed: dict[int, tuple[set[int], set[int]]], group: Sequence[int], at: int
) -> set[int]:
    """Pieces that must still travel at this hop: for it, or for one further on."""
    return set().union(*(needed[d][0] for d in group[at:]))


def carriers(chain: Sequence[Hop], n: int) -> list[tuple[int, ...]]:
    """Of each hop, the devices that hold what travels: they work on it, or pass it on."""
    held: list[tuple[int, ...]] = []
    after: set[int] = set()
    for at in range(len(chain) - 1, -1, -1):
        here = set(chain[at].receivers)
        if after:
            step = chain[at + 1].displacement - chain[at].displacement
            here |= {(i - step) % n for i in after}
        held.append(tuple(sorted(here)))
        after = here
    return held[::-1]


def moves(
    chain: Sequence[Hop], n: int, at: int, held: list[tuple[int, ...]]
) -> list[tuple[int, int]]:
    """(from, to) of what arrives for hop `at` of the chain."""
    before = chain[at - 1].displacement if at else 0
    step = chain[at].displacement - before
    return [((i - step) % n, i) for i in held[at]]


def homecoming(
    chain: Sequence[Hop], n: int, at: int, held: list[tuple[int, ...]]
) -> list[tuple[int, int]]:
    """(from, home) of what travels no further than hop `at`."""
    gone: set[int] = set()
    if at + 1 < len(chain):
        gone = {source for source, _ in moves(chain, n, at + 1, held)}
    return [(i, (i - chain[at].displacement) % n) for i in held[at] if i not in gone]
