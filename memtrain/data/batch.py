"""The batch contract between the data room and everything that reads it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """What one step reads. NumPy arrays of one shape: [B, T] for a batch, [T] for a single row.

    A row holds one contiguous run of valid tokens, at its begin. A position is the offset of the
    token in its document, or in the piece of it that the row shows; `starts` marks where a memory
    must forget. Loss is the mean of `loss_weights` times the negative log-likelihood of `targets`.
    """

    tokens: np.ndarray
    """int32 token ids; 0 where not valid."""
    targets: np.ndarray
    """int32 ids to be predicted at each token; of no meaning where `loss_weights` is 0."""
    loss_weights: np.ndarray
    """float32, 0 where nothing is to be learned (padding, the end of a document)."""
    positions: np.ndarray
    """int32 offset from the begin of the document or piece; 0 where not valid."""
    starts: np.ndarray
    """bool, True where a document (or piece) begins."""
    valid: np.ndarray
    """bool, False on padding."""


def padded_row(
    tokens: np.ndarray,
    targets: np.ndarray,
    loss_weights: np.ndarray,
    positions: np.ndarray,
    starts: np.ndarray,
    seq_len: int,
) -> Batch:
    """One row of `seq_len` from arrays of n <= seq_len tokens; the rest is padding."""
    n = len(tokens)
    row = empty_row(seq_len)
    row.tokens[:n] = tokens
    row.targets[:n] = targets
    row.loss_weights[:n] = loss_weights
    row.positions[:n] = positions
    row.starts[:n] = starts
    row.valid[:n] = True
    return row


def empty_row(seq_len: int) -> Batch:
    """A row of padding alone: [T] zeros, nothing valid."""
    return Batch(
        tokens=np.zeros(seq_len, np.int32),
        targets=np.zeros(seq_len, np.int32),
        loss_weights=np.zeros(seq_len, np.float32),
        positions=np.zeros(seq_len, np.int32),
        starts=np.zeros(seq_len, np.bool_),
        valid=np.zeros(seq_len, np.bool_),
    )


def stack_rows(rows: Sequence[Batch]) -> Batch:
    """[B] rows of [T] as one batch of [B, T]."""
    return Batch(*(np.stack(leaves) for leaves in zip(*rows, strict=True)))
