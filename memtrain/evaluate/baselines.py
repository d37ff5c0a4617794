"""What a language model must beat: Markov models of bytes, and xz.

The Markov models are interpolated with Witten-Bell smoothing (Witten and Bell 1991; Chen and
Goodman 1999): after a context h with N(h) followers, T(h) of them distinct,

    p_k(b | h) = (count(h b) + T(h) p_{k-1}(b | h')) / (N(h) + T(h)),      p_{-1} = 1/256,

where h' is h without its oldest byte. A context that was never seen leaves p_{k-1} as it is.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8, UInt32


MAX_ORDER = 3
"""A context and the byte after it are packed into 32 bits."""
MAX_TRAIN_BYTES = 1 << 26
"""Sorting more takes too long for a report."""

Piece = tuple[UInt8[np.ndarray, "_history"], UInt8[np.ndarray, "_targets"]]
"""Bytes that are known, and those after them that are to be predicted."""


@dataclass(frozen=True)
class _Order:
    """Counts of one order: sorted n-grams (oldest byte highest), and sums over their contexts."""

    grams: UInt32[np.ndarray, "G"]
    counts: np.ndarray
    contexts: UInt32[np.ndarray, "C"]
    followers: np.ndarray
    """N(h)."""
    distinct: np.ndarray
    """T(h)."""


class MarkovModels:
    """Orders 0 to `max_order`, counted at once. n-grams do not cross from one piece into the next.

    Takes about 12 bytes and 0.2 microseconds a byte and order.
    """

    def __init__(self, pieces: Iterable[UInt8[np.ndarray, "_targets"]], max_order: int = MAX_ORDER):
        if not 0 <= max_order <= MAX_ORDER:
            raise ValueError(f"max_order={max_order} must be between 0 and {MAX_ORDER}")
        pieces = [np.asarray(piece, np.uint8) for piece in pieces if len(piece)]
        data = np.concatenate([np.zeros(0, np.uint8), *pieces])
        self.num_bytes = len(data)
        self.max_order = max_order
        lengths = np.array([len(piece) for piece in pieces], np.int64)
        begins = np.cumsum(lengths) - lengths
        self._orders = []
        for order in range(max_order + 1):
            whole = np.ones(len(data), bool)
            for offset in range(order):
                at = begins + offset
                whole[at[at < len(data)]] = False
            self._orders.append(_count(_grams(data, order)[whole]))

    @property
    def num_grams(self) -> list[int]:
        """Distinct n-grams that each order has counted, those of lower orders included."""
        return np.cumsum([len(order.grams) for order in self._orders]).tolist()

    def probabilities(self, pieces: Sequence[Piece]) -> Float[np.ndarray, "K N"]:
        """p(byte) of every byte to be predicted, order by order; all pieces in one row."""
        kept = self.max_order
        joined, known, wanted = [], [], []
        for history, targets in pieces:
            history = np.asarray(history, np.uint8)[max(0, len(history) - kept) :]
            joined += [history, np.asarray(targets, np.uint8)]
            known.append(np.arange(len(history) + len(targets)))
            wanted.append(known[-1] >= len(history))
        data = np.concatenate([np.zeros(0, np.uint8), *joined])
        known = np.concatenate([np.zeros(0, np.int64), *known])
        wanted = np.concatenate([np.zeros(0, bool), *wanted])
        p = np.full(len(data), 1 / 256)
        rows = []
        for order, counted in enumerate(self._orders):
            grams = _grams(data, order)
            count = _lookup(counted.grams, counted.counts, grams)
            followers = _lookup(counted.contexts, counted.followers, grams >> np.uint32(8))
            distinct = _lookup(counted.contexts, counted.distinct, grams >> np.uint32(8))
            usable = (known >= order) & (followers > 0)
            total = np.maximum(followers + distinct, 1)
            p = np.where(usable, (count + distinct * p) / total, p)
            rows.append(p[wanted])
        return np.stack(rows)

    def bits_per_byte(self, pieces: Sequence[Piece]) -> list[float]:
        """Mean of -log2 p over the bytes to be predicted, for order 0 to max_order."""
        return (-np.log2(self.probabilities(pieces))).mean(axis=1).tolist()


def xz_bits_per_byte(files: Sequence[bytes]) -> float:
    """Bits per byte of `xz -9e`, every file compressed on its own, headers included."""
    compressed = 0
    for content in files:
        # The preset's 64 MiB dictionary is no use to a shorter file, and takes 674 MiB of memory.
        size = min(max(len(content), 4096), 1 << 26)
        extreme = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": size}
        compressed += len(lzma.compress(content, format=lzma.FORMAT_XZ, filters=[extreme]))
    return 8 * compressed / sum(map(len, files))


def _grams(data: UInt8[np.ndarray, "_targets"], order: int) -> UInt32[np.ndarray, "n"]:
    """Each byte with the `order` bytes before it, packed; zeros stand before the first byte."""
    packed = np.zeros(len(data), np.uint32)
    for back in range(min(order + 1, len(data))):
        packed[back:] |= data[: len(data) - back].astype(np.uint32) << np.uint32(8 * back)
    return packed


def _count(grams: UInt32[np.ndarray, "n"]) -> _Order:
    grams, counts = np.unique(grams, return_counts=True)
    contexts, begins, distinct = np.unique(
        grams >> np.uint32(8), return_index=True, return_counts=True
    )
    followers = np.add.reduceat(counts, begins) if len(begins) else counts
    return _Order(grams, counts, contexts, followers, distinct)


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 where there is none. Keys are sorted."""
    if not len(keys):
        return np.zeros(len(wanted), np.int64)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
