"""Bits per byte of held-out text, overall and by position in the context."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from memtrain.decode.engine import Engine
from memtrain.evaluate.scoring import score_rows
from memtrain.evaluate.subject import HeldOut


@dataclass(frozen=True)
class Pieces:
    """Consecutive parts of documents, each to be read from an empty memory.

    A token is predicted in one piece only; the first of a document is not, for nothing is known.
    """

    tokens: Int[np.ndarray, "N T"]
    targets: Int[np.ndarray, "N T"]
    valid: Bool[np.ndarray, "N T"]
    document: Int[np.ndarray, "N"]
    """Which document the piece is of."""
    begin: Int[np.ndarray, "N"]
    """Offset of its first token in the document."""
    num_pieces: int
    """That the documents hold, taken or not."""

    @property
    def num_targets(self) -> int:
        return int(self.valid.sum())

    def in_bytes(self, held_out: HeldOut) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each piece the bytes before its first target, in the document, and its targets'."""
        found = []
        for row in range(len(self.tokens)):
            begin, count = int(self.begin[row]), int(self.valid[row].sum())
            before = held_out.tokens(int(self.document[row]))[max(0, begin - 8) : begin + 1]
            parts = before, self.targets[row, :count]
            history, wanted = (
                np.frombuffer(held_out.tokenizer.decode_bytes(part), np.uint8) for part in parts
            )
            found.append((history, wanted))
        return found


def cut_pieces(held_out: HeldOut, length: int, max_tokens: int, *, whole: bool = False) -> Pieces:
    """Pieces of `length` tokens, a shorter one at the end of each document.

    If all hold more than `max_tokens`, as many as fit are taken at even distances from each other;
    whole: pieces that are `length` tokens long come first.
    """
    places = [
        (document, begin)
        for document in range(len(held_out))
        for begin in range(0, len(held_out.tokens(document)) - 1, length)
    ]
    most = max(1, max_tokens // length)
    taken = places
    if len(places) > most:
        long = [(d, b) for d, b in places if whole and b + length < len(held_out.tokens(d))]
        first = _spread(long, min(most, len(long)))
        rest = sorted(set(places) - set(first))
        taken = sorted([*first, *_spread(rest, most - len(first))])
    tokens = np.zeros((len(taken), length), np.int32)
    targets, valid = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
    for row, (document, begin) in enumerate(taken):
        text = held_out.tokens(document)[begin : begin + length + 1]
        count = len(text) - 1
        tokens[row, :count], targets[row, :count], valid[row, :count] = text[:-1], text[1:], True
    where = np.array(taken, np.int64).reshape(-1, 2)
    return Pieces(tokens, targets, valid, where[:, 0], where[:, 1], len(places))


def _spread(places: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """So many of them, at even distances."""
    return [places[int((i + 0.5) * len(places) / count)] for i in range(count)]


def bytes_per_token(pieces: Pieces, held_out: HeldOut) -> float:
    """Bytes that a target of the pieces stands for, on average."""
    return sum(len(targets) for _, targets in pieces.in_bytes(held_out)) / pieces.num_targets


def piece_losses(engine: Engine, pieces: Pieces) -> Float[np.ndarray, "N T"]:
    """Nats of every target; 0 where there is none."""
    return score_rows(engine, pieces.tokens, pieces.targets, pieces.valid).nll


def position_edges(length: int) -> list[int]:
    """0, 8, 16, 32, ... up to `length`: what is learned from context is learned early."""
    edges = [0, *(8 << i for i in range(64) if 8 << i < length), length]
    if len(edges) > 2 and edges[-1] - edges[-2] < edges[-2] // 4:
        del edges[-2]
    return edges


def bits_by_position(
    nll: Float[np.ndarray, "N T"], valid: Bool[np.ndarray, "N T"], bytes_per_token: float
) -> list[dict[str, Any]]:
    """Bits per byte of the targets that are predicted from `from` + 1 to `to` tokens."""
    rows = []
    edges = position_edges(nll.shape[1])
    for begin, end in pairwise(edges):
        count = int(valid[:, begin:end].sum())
        if count:
            bits = float(nll[:, begin:end].sum(dtype=np.float64)) / math.log(2) / bytes_per_token
            rows.append({"from": begin, "to": end, "bits_per_byte": bits / count, "tokens": count})
    return rows


def mean_bits(nll: np.ndarray, valid: np.ndarray, bytes_per_token: float) -> float:
    """Bits per byte over all valid targets."""
    bits = float(nll[valid].sum(dtype=np.float64)) / math.log(2)
    return bits / bytes_per_token / int(valid.sum())
