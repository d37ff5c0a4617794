"""The batches that the laws are checked on: packed documents, padding, and cuts into calls."""

from __future__ import annotations

import dataclasses

import numpy as np

from memtrain.memory.protocol import Context


BATCH = 8
"""Rows of a case: each another layout, and a number that 8 devices divide."""

LEAST_CAPACITY = 32
"""Tokens that a state has room for, where rows are short."""

CALL_LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987)
FEW_CALL_LENGTHS = (1, 3, 8, 13, 21, 55, 144, 377, 987)
"""Calls have these lengths only: each costs a compilation."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Documents in rows: int32 positions, bool starts and valid, all [BATCH, T], on the host.

    documents: number of each token's document in its row, from 0; -1 where invalid.
    """

    positions: np.ndarray
    starts: np.ndarray
    valid: np.ndarray
    documents: np.ndarray
    token_ids: np.ndarray

    def context(self, tables: dict, **more) -> Context:
        return Context(
            positions=self.positions,  # type: ignore[arg-type]
            starts=self.starts,  # type: ignore[arg-type]
            valid=self.valid,  # type: ignore[arg-type]
            token_ids=self.token_ids,  # type: ignore[arg-type]
            tables=tables,
            **more,
        )

    @property
    def last_document(self) -> np.ndarray:
        """Bool [BATCH, T]: tokens of the last document of a row that has others before it."""
        last = self.documents.max(axis=1, keepdims=True)
        return (self.documents == last) & (last > 0)

    @property
    def earlier_documents(self) -> np.ndarray:
        """Bool [BATCH, T]: valid tokens before the last document."""
        return self.valid & (self.documents < self.documents.max(axis=1, keepdims=True))


def draw_layout(rng: np.random.Generator, length: int) -> Layout:
    """Eight rows of `length` tokens that between them hold every situation the protocol allows.

    Whole documents, packed ones, single tokens, padding on either side and on both, a document that
    began before the row, positions with gaps, positions next to the largest int32, an empty row.
    """
    if length < 13:
        raise ValueError(f"length={length}: rows of several documents need at least 13 tokens")
    share = lambda f: max(1, round(f * length))  # noqa: E731
    far = 2**31 - 1 - 4 * length
    rest = length - 2 * share(0.1)
    rows = [
        _row(length, 0, [length]),
        _row(length, 0, [share(0.14), share(0.24), length - share(0.14) - share(0.24)]),
        _row(length, share(0.2), [share(0.3), length - share(0.2) - share(0.3)]),
        _row(length, 0, [share(0.45), share(0.4)]),
        _row(length, share(0.1), [rest // 2, rest - rest // 2], begun_at=far),
        _row(length, 0, [1, 1, 1, 2, length - 5]),
        _row(length, 0, [length], gaps=rng),
        _row(length, length, []),
    ]
    positions, starts, valid, documents = (np.stack(column) for column in zip(*rows, strict=True))
    token_ids = rng.integers(0, 97, (BATCH, length), np.int32)
    return Layout(positions, starts, valid, documents, token_ids)


def draw_carried_layout(rng: np.random.Generator, before: int, length: int) -> Layout:
    """Eight rows of `before + length` tokens, of which the last `length` are one sharded call.

    For calls that are cut into equal stretches: documents that go on from before and fill the call,
    that begin on the edge of a stretch (of 2, 4 or 8) and inside one, single tokens, whole
    stretches of padding on either side, a document that begins with the call, an empty row.
    """
    if before < 4 or length < 16 or length % 8:
        raise ValueError(f"before={before}, length={length}: at least 4, and 16 in eights")
    total, far = before + length, 2**31 - 1 - 4 * (before + length)
    rest = length - length // 8 - 6
    rows = [
        _row(total, 0, [total]),
        _row(total, 0, [before + length // 4, 3 * length // 4]),
        _row(total, before + 3, [5, length - 8]),
        _row(total, 0, [before - 2, 2 + length // 2, 3]),
        _row(total, 2, [before - 2 + length // 8 + 1, 1, 1, rest], begun_at=far),
        _row(total, 0, [before, length]),
        _row(total, 0, [total], gaps=rng),
        _row(total, total, []),
    ]
    positions, starts, valid, documents = (np.stack(column) for column in zip(*rows, strict=True))
    token_ids = rng.integers(0, 97, (BATCH, total), np.int32)
    return Layout(positions, starts, valid, documents, token_ids)


def _row(
    length: int,
    left: int,
    lengths: list[int],
    begun_at: int | None = None,
    gaps: np.random.Generator | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """positions, starts, valid, documents [length]: `left` padding, the documents, padding.

    begun_at: the first document began before the row and goes on from this position.
    """
    positions = np.zeros(length, np.int32)
    starts = np.zeros(length, bool)
    documents = np.full(length, -1, np.int32)
    at = left
    for number, n in enumerate(lengths):
        steps = np.arange(n) if gaps is None else np.cumsum(gaps.integers(1, 4, n)) - 1
        goes_on = number == 0 and begun_at is not None
        positions[at : at + n] = steps + (begun_at if goes_on and begun_at else 0)
        documents[at : at + n] = number
        starts[at] = not goes_on
        at += n
    if at > length:
        raise AssertionError(f"documents of {lengths} do not fit in {length} tokens")
    return positions, starts, documents >= 0, documents


def draw_cut(
    rng: np.random.Generator, length: int, lengths: tuple[int, ...] = FEW_CALL_LENGTHS
) -> tuple[int, ...]:
    """Call lengths that add up to `length`."""
    cut: list[int] = []
    while (left := length - sum(cut)) > 0:
        cut.append(int(rng.choice([n for n in lengths if n <= left])))
    return tuple(cut)


def halves(length: int) -> tuple[int, int]:
    """The largest call shorter than the whole, and the rest."""
    first = max(n for n in FEW_CALL_LENGTHS if n < length)
    return first, length - first
