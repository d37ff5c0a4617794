"""Rows of text: which tokens a sample reads, as a pure function of its number."""

import threading
from typing import NamedTuple, Protocol

import numpy as np

from memtrain.data.batch import Batch, empty_row, padded_row
from memtrain.data.corpus import Documents
from memtrain.data.seeded import Permutation, derive, random_order


_EPOCHS_KEPT = 3


class Rows(Protocol):
    """Anything that can be asked for sample i, in any order, from any thread."""

    def row(self, index: int) -> Batch:
        """Sample `index` (0 <= index, no upper end): leaves of [T]."""
        ...


class _Order(NamedTuple):
    """The documents of one epoch laid end to end."""

    begins: np.ndarray
    """[D] where each document begins in the corpus, in this epoch's order."""
    ends: np.ndarray
    """[D] where each document ends in the stream, cumulative."""


class Stream:
    """The documents in a new seeded order every epoch, laid end to end: N tokens an epoch."""

    def __init__(self, documents: Documents, key: int) -> None:
        self._documents = documents
        self._lengths = documents.ends - documents.begins
        self._key = key
        self._orders: dict[int, _Order] = {}
        self._lock = threading.Lock()
        self.num_tokens = documents.num_tokens

    def _order(self, epoch: int) -> _Order:
        with self._lock:
            if epoch not in self._orders:
                while len(self._orders) >= _EPOCHS_KEPT:
                    del self._orders[next(iter(self._orders))]
                order = random_order(derive(self._key, "documents", epoch), len(self._lengths))
                begins = self._documents.begins[order]
                self._orders[epoch] = _Order(begins, np.cumsum(self._lengths[order]))
            return self._orders[epoch]

    def read(self, epoch: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [begin, end) of an epoch, and the offset of each in its document: int32, int32."""
        order = self._order(epoch)
        tokens = np.empty(end - begin, np.int32)
        offsets = np.empty(end - begin, np.int32)
        document = int(np.searchsorted(order.ends, begin, side="right"))
        at = begin
        while at < end:
            until = min(end, int(order.ends[document]))
            in_stream = int(order.ends[document - 1]) if document else 0
            source = int(order.begins[document]) + at - in_stream
            tokens[at - begin : until - begin] = self._documents.tokens[
                source : source + until - at
            ]
            offsets[at - begin : until - begin] = np.arange(at - in_stream, until - in_stream)
            at = until
            document += 1
        return tokens, offsets


def num_rows(num_tokens: int, seq_len: int) -> int:
    """Rows that hold every token of a stream but the last as an input, the last row padded."""
    return -(-(num_tokens - 1) // seq_len)


def one_document(tokens: np.ndarray, weights: np.ndarray, seq_len: int) -> Batch:
    """[n + 1] tokens and their weights as targets, as one row that is one document."""
    n = len(tokens) - 1
    starts = np.arange(n) == 0
    positions = np.arange(n, dtype=np.int32)
    return padded_row(tokens[:-1], tokens[1:], weights[1:], positions, starts, seq_len)


class PackedRows:
    """Rows cut from the stream one after the other, read in a seeded order.

    Row k holds tokens [kT, kT + T] of the stream, the last of them as a target only. A document
    that goes on from the row before begins anew, at position 0, for what came before it is absent.
    The first token of a document is never a target. The last row of an epoch is padded.
    """

    def __init__(self, stream: Stream, seq_len: int, key: int, *, shuffle: bool = True) -> None:
        self._stream = stream
        self._seq_len = seq_len
        self._key = key
        self._shuffle = shuffle
        self.rows_per_epoch = num_rows(stream.num_tokens, seq_len)

    def row(self, index: int) -> Batch:
        epoch, index = divmod(index, self.rows_per_epoch)
        if self._shuffle:
            index = Permutation(self.rows_per_epoch, derive(self._key, "rows", epoch))(index)
        begin = index * self._seq_len
        end = min(begin + self._seq_len + 1, self._stream.num_tokens)
        tokens, offsets = self._stream.read(epoch, begin, end)
        starts = offsets[:-1] == 0
        starts[0] = True
        places = np.arange(len(starts), dtype=np.int32)
        positions = places - np.maximum.accumulate(np.where(starts, places, 0))
        return padded_row(
            tokens[:-1], tokens[1:], offsets[1:] != 0, positions, starts, self._seq_len
        )


class DocumentRows:
    """Rows in document order: lane r of the batch goes on at step t where it stopped at t - 1.

    An epoch's rows, uncut by shuffling, are dealt to `batch_size` lanes in contiguous parts whose
    lengths differ by at most one row; a lane that is one short ends the epoch with a row of
    padding. Sample i is lane i % batch_size at step i // batch_size. Positions are offsets in the
    document itself, also where a lane begins an epoch in the middle of one, which `starts` marks.
    """

    def __init__(self, stream: Stream, seq_len: int, batch_size: int) -> None:
        self._stream = stream
        self._seq_len = seq_len
        self._num_lanes = batch_size
        self._num_rows = num_rows(stream.num_tokens, seq_len)
        self.steps_per_epoch = -(-self._num_rows // batch_size)
        self.rows_per_epoch = self.steps_per_epoch * batch_size

    def row(self, index: int) -> Batch:
        step, lane = divmod(index, self._num_lanes)
        epoch, step = divmod(step, self.steps_per_epoch)
        first = lane * self._num_rows // self._num_lanes
        if first + step >= (lane + 1) * self._num_rows // self._num_lanes:
            return empty_row(self._seq_len)
        begin = (first + step) * self._seq_len
        end = min(begin + self._seq_len + 1, self._stream.num_tokens)
        tokens, offsets = self._stream.read(epoch, begin, end)
        starts = offsets[:-1] == 0
        starts[0] |= step == 0
        return padded_row(
            tokens[:-1], tokens[1:], offsets[1:] != 0, offsets[:-1], starts, self._seq_len
        )


class MixedRows:
    """A `share` of the samples from one source, evenly spread, the others from another.

    Of any first n samples, floor(n * share) are `some`; both sources are read in their own order,
    without gaps. The share is held to 2**-32.
    """

    def __init__(self, rest: Rows, some: Rows, share: float) -> None:
        self.rest = rest
        self._some = some
        self._numerator = round(share * 2**32)

    def count(self, index: int) -> int:
        """How many of samples 0 .. index - 1 are `some`."""
        return (index * self._numerator) >> 32

    def row(self, index: int) -> Batch:
        before = self.count(index)
        if self.count(index + 1) > before:
            return self._some.row(before)
        return self.rest.row(index - before)
