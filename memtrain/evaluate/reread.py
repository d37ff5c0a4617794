"""Reading a text twice: what the second reading costs less than the first was remembered."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from memtrain.decode.engine import Engine
from memtrain.errors import BadInput
from memtrain.evaluate.bits import position_edges
from memtrain.evaluate.scoring import score_rows
from memtrain.evaluate.subject import HeldOut


@dataclass(frozen=True)
class Reread:
    """Bits per byte of the same tokens in both readings, by piece and position in the piece."""

    first: Float[np.ndarray, "N n"]
    second: Float[np.ndarray, "N n"]


def reread_pieces(held_out: HeldOut, context: int, num_pieces: int) -> Int[np.ndarray, "N n"]:
    """Pieces of half the context, so that both readings fit in it, from all over the documents.

    Raises BadInput where no document is long enough.
    """
    length = context // 2
    spans = held_out.documents
    places = [
        (document, begin)
        for document, size in enumerate((spans.ends - spans.begins).tolist())
        for begin in range(0, size - length, length)
    ]
    if not places or length < 2:
        raise BadInput(f"no document of the held-out text has {length} tokens to be read twice")
    count = min(num_pieces, len(places))
    taken = [places[int((i + 0.5) * len(places) / count)] for i in range(count)]
    return np.stack([held_out.tokens(doc)[begin : begin + length] for doc, begin in taken])


def reread(engine: Engine, pieces: Int[np.ndarray, "N n"], bytes_per_token: float = 1.0) -> Reread:
    """Both readings of each piece, one straight after the other, from an empty memory.

    The piece's first token is left out of both: in the first reading nothing is known before it,
    and in the second the end of the text stands there.
    """
    length = pieces.shape[1]
    twice = np.concatenate([pieces, pieces], axis=1)
    nll = score_rows(engine, twice[:, :-1], twice[:, 1:]).nll
    bits = nll.astype(np.float64) / math.log(2) / bytes_per_token
    return Reread(bits[:, : length - 1], bits[:, length:])


def by_position(found: Reread) -> list[dict[str, Any]]:
    """Both readings' bits per byte, predicted from `from` + 1 to `to` tokens of the piece:
    how soon a text is known again."""
    return [
        {
            "from": begin,
            "to": end,
            "first": float(found.first[:, begin:end].mean()),
            "second": float(found.second[:, begin:end].mean()),
        }
        for begin, end in pairwise(position_edges(found.first.shape[1]))
    ]
