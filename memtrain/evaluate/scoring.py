"""Rows of tokens through the engine: padded to its fixed shapes, batch after batch."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int

from memtrain.decode.engine import Engine, Scores


def score_rows(
    engine: Engine,
    tokens: Int[np.ndarray, "N T"],
    targets: Int[np.ndarray, "N T"],
    valid: Bool[np.ndarray, "N T"] | None = None,
    *,
    starts: Bool[np.ndarray, "N T"] | None = None,
) -> Scores:
    """Scores of all targets, every row read from an empty memory, in chunks of one size.

    starts: documents that begin within a row; one that begins it need not be told.
    Leaves the engine in no particular state. nll is 0 and correct False where not valid.
    """
    valid = np.ones(tokens.shape, bool) if valid is None else valid
    starts = np.zeros(tokens.shape, bool) if starts is None else starts
    count, length = tokens.shape
    chunk, batch = engine.buckets[-1], engine.batch
    # Whole chunks and whole batches: no program is compiled for the remainders.
    padding = ((0, -count % batch), (0, -length % chunk))
    tokens, targets, valid, starts = (np.pad(a, padding) for a in (tokens, targets, valid, starts))
    parts = []
    for begin in range(0, len(tokens), batch):
        rows = slice(begin, begin + batch)
        engine.reset()
        # Chunks after the end of the longest row of the batch need not be read.
        end = -(-int(valid[rows].sum(axis=1).max()) // chunk) * chunk
        found = engine.score(
            tokens[rows, :end],
            targets[rows, :end],
            starts=starts[rows, :end],
            valid=valid[rows, :end],
        )
        missing = ((0, 0), (0, tokens.shape[1] - end))
        parts.append(Scores(*(np.pad(a, missing) for a in found)))
    return Scores(*(np.concatenate(column)[:count, :length] for column in zip(*parts, strict=True)))
