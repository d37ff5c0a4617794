"""Rows over documents whose tokens are all different numbers, so each is known by sight."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrain.data.batch import Batch, empty_row
from memtrain.data.corpus import Documents
from memtrain.data.rows import DocumentRows, MixedRows, PackedRows, Stream


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12).filter(lambda ls: sum(ls) > 1)
LAW = settings(derandomize=True, deadline=None, max_examples=60)


def numbered(lengths: list[int], skip: int = 3) -> Documents:
    """Token k of document d is number `begins[d] + k`; there is foreign text between documents."""
    begins, at = [], skip
    for length in lengths:
        begins.append(at)
        at += length + skip
    return Documents(np.arange(at), np.array(begins), np.array(begins) + np.array(lengths))


def document_of(documents: Documents, token: int) -> tuple[int, int]:
    """Document of a token, and where in it, by search."""
    (found,) = [
        (d, token - int(a))
        for d, (a, b) in enumerate(zip(documents.begins, documents.ends, strict=True))
        if a <= token < b
    ]
    return found


def check_row(documents: Documents, row: Batch, *, from_document: bool, lane_begins: bool) -> None:
    """A row against the definition, token by token."""
    length = int(row.valid.sum())
    assert row.valid.tolist() == [True] * length + [False] * (len(row.valid) - length)
    padding = empty_row(len(row.valid))
    for leaf, empty in zip(row, padding, strict=True):
        assert leaf.dtype == empty.dtype and leaf.shape == empty.shape
        assert np.array_equal(leaf[length:], empty[length:])
    piece_begin = 0
    for j in range(length):
        _, offset = document_of(documents, int(row.tokens[j]))
        begins = offset == 0 or (j == 0 and lane_begins)
        assert bool(row.starts[j]) == begins
        piece_begin = j if begins else piece_begin
        assert row.positions[j] == (offset if from_document else j - piece_begin)
        same = document_of(documents, int(row.targets[j]))[1] > 0
        assert row.loss_weights[j] == float(same)
        if same:
            assert row.targets[j] == row.tokens[j] + 1
        if j + 1 < length:
            assert row.targets[j] == row.tokens[j + 1]


def check_epoch(documents: Documents, rows: list[Batch]) -> None:
    """Every token once as input (but one), and every one that has a predecessor once as target."""
    every = np.concatenate([np.arange(a, b) for a, b in zip(*documents[1:], strict=True)])
    inputs = sorted(int(t) for row in rows for t in row.tokens[row.valid])
    left_out = sorted(set(every.tolist()) - set(inputs))
    assert len(inputs) == len(set(inputs)) == len(every) - 1
    assert len(left_out) == 1 and left_out[0] in documents.ends - 1
    targets = sorted(int(t) for row in rows for t in row.targets[row.loss_weights > 0])
    assert targets == sorted(set(every.tolist()) - set(documents.begins.tolist()))


@LAW
@given(lengths=LENGTHS, seq_len=st.integers(1, 30), key=st.integers(0, 2**64 - 1))
def test_packed_rows_hold_every_token_of_each_epoch_once(lengths, seq_len, key):
    documents = numbered(lengths)
    rows = PackedRows(Stream(documents, key), seq_len, key)
    for epoch in (0, 1, 7):
        first = epoch * rows.rows_per_epoch
        read = [rows.row(first + i) for i in range(rows.rows_per_epoch)]
        for row in read:
            check_row(documents, row, from_document=False, lane_begins=True)
        check_epoch(documents, read)
        assert sum(not row.valid.all() for row in read) <= 1


@LAW
@given(
    lengths=LENGTHS,
    seq_len=st.integers(1, 20),
    batch_size=st.integers(1, 5),
    key=st.integers(0, 2**64 - 1),
)
def test_document_rows_go_on_where_they_stopped(lengths, seq_len, batch_size, key):
    documents = numbered(lengths)
    rows = DocumentRows(Stream(documents, key), seq_len, batch_size)
    steps = rows.steps_per_epoch
    for epoch in (0, 3):
        read = []
        for lane in range(batch_size):
            expected = None
            for step in range(steps):
                row = rows.row((epoch * steps + step) * batch_size + lane)
                if not row.valid.any():
                    assert step in (steps - 1, 0)
                    continue
                check_row(documents, row, from_document=True, lane_begins=step == 0)
                if expected is not None:
                    assert row.tokens[0] == expected
                expected = row.targets[row.valid][-1]
                read.append(row)
        check_epoch(documents, read)


def test_epochs_differ_in_order_and_seeds_too():
    documents = numbered([17] * 30)
    orders = []
    for key in (1, 2):
        rows = PackedRows(Stream(documents, key), 10, key)
        for epoch in (0, 1):
            first = epoch * rows.rows_per_epoch
            orders.append([int(rows.row(first + i).tokens[0]) for i in range(rows.rows_per_epoch)])
    assert len({tuple(order) for order in orders}) == 4
    # Rows next to each other in the stream are not read one after the other.
    follows = [b - a == 10 for order in orders for a, b in pairwise(order)]
    assert np.mean(follows) < 0.1


class Numbered:
    """Sample i of source s says so."""

    def __init__(self, source: int) -> None:
        self.source = source

    def row(self, index: int) -> Batch:
        row = empty_row(2)
        row.tokens[:] = self.source, index
        return row


@pytest.mark.parametrize("share", [0.0, 0.1, 1 / 3, 0.5, 0.77])
def test_a_mixture_has_its_share_everywhere_and_leaves_nothing_out(share: float):
    mixed = MixedRows(Numbered(0), Numbered(1), share)
    read = [mixed.row(i).tokens.tolist() for i in range(3000)]
    for source in (0, 1):
        numbers = [index for s, index in read if s == source]
        assert numbers == list(range(len(numbers)))
    some = np.cumsum([s for s, _ in read])
    for n in (1, 10, 99, 1000, 3000):
        assert abs(some[n - 1] - n * share) <= 1
        assert mixed.count(n) == some[n - 1]
