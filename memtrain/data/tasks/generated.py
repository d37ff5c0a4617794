"""What tasks that stand instead of text have in common: rows of numbers, and questions in them."""

from typing import NamedTuple, Protocol

import numpy as np

from memtrain.data.batch import Batch, stack_rows


class Asked(NamedTuple):
    """A row or a batch with its questions: where `loss_weights` is 1, `targets` is the answer."""

    batch: Batch
    distances: np.ndarray
    """int32, the shape of the batch's leaves: tokens from where the answer can be known to where it
    is asked for; 0 where nothing is asked, and where the answer is nowhere in the row."""


class GeneratedRows(Protocol):
    """A training set and a held-out one; every row is a function of its number."""

    rows_per_epoch: int
    num_held_out: int

    def row(self, index: int) -> Batch:
        """Training sample `index` (0 <= index, no upper end): leaves of [T]."""
        ...

    def held_out(self, index: int) -> Asked:
        """Held-out row `index` < `num_held_out`: leaves of [T]."""
        ...


def stack_asked(rows: list[Asked]) -> Asked:
    """[B] rows of [T] as one batch of [B, T]."""
    batch = stack_rows([row.batch for row in rows])
    return Asked(batch, np.stack([row.distances for row in rows]))


def asked_row(
    tokens: np.ndarray, answers: np.ndarray, distances: np.ndarray, columns: np.ndarray
) -> Asked:
    """One document of [T] tokens with these answers asked for at these columns, [Q] each."""
    seq_len = len(tokens)
    targets = np.zeros(seq_len, np.int32)
    weights = np.zeros(seq_len, np.float32)
    back = np.zeros(seq_len, np.int32)
    targets[columns], weights[columns], back[columns] = answers, 1.0, distances
    starts = np.arange(seq_len) == 0
    positions = np.arange(seq_len, dtype=np.int32)
    valid = np.ones(seq_len, np.bool_)
    batch = Batch(tokens.astype(np.int32), targets, weights, positions, starts, valid)
    return Asked(batch, back)
