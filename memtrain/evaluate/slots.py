"""Which slots of a memory table are read, how unevenly, and on what text."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from memtrain.data.tokenizer import Tokenizer
from memtrain.evaluate.bits import Pieces
from memtrain.evaluate.subject import Subject
from memtrain.model.language_model import full_pattern


BEFORE, AFTER = 16, 6
"""Tokens that are shown around the place where a slot fires."""
CONTEXT = 3
"""A slot is specific where it fires after the same few tokens again and again."""


@dataclass(frozen=True)
class Reads:
    """All reads of one table by some text. One entry for each read of a slot at a token."""

    table: str
    num_slots: int
    row: Int[np.ndarray, "R"]
    column: Int[np.ndarray, "R"]
    slot: Int[np.ndarray, "R"]
    weight: Float[np.ndarray, "R"]

    @property
    def mass(self) -> Float[np.ndarray, "S"]:
        """The weight that each slot was read with, in all."""
        return np.bincount(self.slot, self.weight, minlength=self.num_slots)


@dataclass(frozen=True)
class Firing:
    """A place in the text where a slot was read."""

    before: str
    at: str
    """The token that was read when the slot fired."""
    after: str
    """What came next."""
    weight: float


@dataclass(frozen=True)
class Slot:
    """One slot and the places where it was read with the most weight."""

    slot: int
    share: float
    """Of the weight of all reads of the table."""
    specificity: float
    """Share of its weight that falls on its most frequent context of three tokens."""
    firings: list[Firing]


def record_reads(subject: Subject, pieces: Pieces, max_tokens: int) -> list[Reads]:
    """The reads of every table of the model on some of the pieces. Empty without tables."""
    places = _tables(subject)
    if not places:
        return []
    # Logits come along with the reads, so few rows where the vocabulary is large.
    batch = max(1, min(8, (1 << 21) // subject.vocab_size // 256))
    length = pieces.tokens.shape[1]
    engine = subject.engine(batch=batch, chunk=128, want_reads=True)
    chunk = engine.buckets[-1]
    wanted = max(1, min(len(pieces.tokens), max_tokens // length))
    # Evenly spread, as pieces are in order of the documents.
    rows = np.unique(np.linspace(0, len(pieces.tokens) - 1, wanted).astype(int))
    found: dict[str, list[tuple[np.ndarray, ...]]] = defaultdict(list)
    for first in range(0, len(rows), batch):
        group = rows[first : first + batch]
        engine.reset()
        for begin in range(0, length, chunk):
            tokens = np.zeros((batch, chunk), np.int32)
            part = pieces.tokens[group, begin : begin + chunk]
            tokens[: len(part), : part.shape[1]] = part
            if part.shape[1] < chunk and engine.bounded:
                tokens = tokens[:, : part.shape[1]]
            _, reads = engine.trace(tokens)
            valid = pieces.valid[group, begin : begin + chunk]
            i, j = np.nonzero(valid)
            for place, read in reads.items():
                if place not in places or "slots" not in read:
                    continue
                slots, weights = read["slots"][i, j], read["weights"][i, j]
                width = slots.shape[1]
                found[places[place][0]].append(
                    (
                        np.repeat(group[i], width),
                        np.repeat(begin + j, width),
                        slots.reshape(-1),
                        weights.reshape(-1),
                    )
                )
    sizes = dict(places.values())
    return [
        Reads(table, sizes[table], *(np.concatenate(column) for column in zip(*parts, strict=True)))
        for table, parts in found.items()
    ]


def _tables(subject: Subject) -> dict[str, tuple[str, int]]:
    """`LAYER.PLACE` -> name and slots of the one table that the layer there reads."""
    config = subject.experiment.model
    pattern = full_pattern(config)
    found = {}
    for index in range(len(pattern) * config.repeats):
        block = pattern[index % len(pattern)]
        for place, layer in (("mixer", block.mixer), ("ffn", block.ffn)):
            tables = layer.tables() if layer is not None else {}
            if len(tables) == 1:
                ((name, spec),) = tables.items()
                found[f"{index}.{place}"] = name, spec.num_slots
    return found


def most_read(
    reads: Reads,
    pieces: Pieces,
    tokenizer: Tokenizer,
    *,
    num_read: int = 6,
    num_specific: int = 6,
    num_firings: int = 5,
) -> tuple[list[Slot], list[Slot]]:
    """The slots with the most weight; and of those read at least as much as the average one, the
    slots that are the most specific."""
    mass = reads.mass
    order = np.argsort(reads.slot, kind="stable")
    begins = np.searchsorted(reads.slot[order], np.arange(reads.num_slots + 1))

    def entries(slot: int) -> np.ndarray:
        return order[begins[slot] : begins[slot + 1]]

    contexts = _context_ids(pieces.tokens)
    used = np.flatnonzero(mass > 0)
    often = used[mass[used] >= mass[used].mean()]
    specificity = {}
    for slot in often.tolist():
        at = entries(slot)
        _, group = np.unique(contexts[reads.row[at], reads.column[at]], return_inverse=True)
        specificity[slot] = float(np.bincount(group, reads.weight[at]).max() / mass[slot])

    def describe(slot: int) -> Slot:
        firings = _firings(reads, pieces, tokenizer, entries(slot), num_firings)
        return Slot(slot, float(mass[slot] / mass.sum()), specificity[slot], firings)

    top = sorted(often.tolist(), key=lambda s: (-mass[s], s))[:num_read]
    rest = sorted(set(often.tolist()) - set(top), key=lambda s: (-specificity[s], -mass[s], s))
    return [describe(s) for s in top], [describe(s) for s in rest[:num_specific]]


def _context_ids(tokens: Int[np.ndarray, "N T"]) -> Int[np.ndarray, "N T"]:
    """A number for the last `CONTEXT` tokens up to each place; equal where they are equal."""
    ids = np.zeros(tokens.shape, np.int64)
    base = int(tokens.max()) + 2
    for back in range(CONTEXT):
        ids *= base
        ids[:, back:] += tokens[:, : tokens.shape[1] - back] + 1
    return ids


def _firings(
    reads: Reads, pieces: Pieces, tokenizer: Tokenizer, entries: np.ndarray, count: int
) -> list[Firing]:
    """The strongest, no two of the same text around."""
    strongest = entries[np.argsort(-reads.weight[entries], kind="stable")]
    found: dict[str, Firing] = {}
    for entry in strongest:
        row, column = int(reads.row[entry]), int(reads.column[entry])
        end = int(pieces.valid[row].sum())
        tokens = pieces.tokens[row, :end]
        show = lambda a, b, tokens=tokens: tokenizer.decode(tokens[max(0, a) : max(0, b)])  # noqa: E731
        before = show(column - BEFORE, column)
        at, after = show(column, column + 1), show(column + 1, column + 1 + AFTER)
        # The same few tokens before are the same reason to fire.
        found.setdefault(before[-6:] + at, Firing(before, at, after, float(reads.weight[entry])))
        if len(found) == count:
            break
    return list(found.values())
