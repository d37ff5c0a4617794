"""Recall: facts told somewhere in held-out text, asked for later. Accuracy by distance."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from memtrain.data.batch import stack_rows
from memtrain.data.config import RecallTask
from memtrain.data.seeded import derive
from memtrain.data.tasks.recall import MARK, RecallRows, check_recall
from memtrain.data.tokenizer import Tokenizer
from memtrain.decode.engine import Engine
from memtrain.errors import BadInput
from memtrain.evaluate.scoring import score_rows
from memtrain.evaluate.subject import HeldOut, Subject


LETTERS = 26
"""Capitals that an answer is drawn from."""


@dataclass(frozen=True)
class Questions:
    """Rows like those of training, over held-out text, with facts that were never seen."""

    tokens: Int[np.ndarray, "N T"]
    targets: Int[np.ndarray, "N T"]
    valid: Bool[np.ndarray, "N T"]
    row: Int[np.ndarray, "Q"]
    """Row of each question."""
    begin: Int[np.ndarray, "Q"]
    """First column of `targets` that holds its answer."""
    length: Int[np.ndarray, "Q"]
    """Tokens of its answer."""
    distance: Int[np.ndarray, "Q"]
    """Tokens from the begin of the value where last told to the begin of the answer."""


def task_of(subject: Subject) -> RecallTask:
    """The run's own recall task, or the default one with as many facts as its rows have room for.

    Raises BadInput where the tokenizer or the length of the rows leaves none.
    """
    tokenizer, seq_len = subject.need_tokenizer("recall"), subject.experiment.train.seq_len
    task = subject.experiment.data.recall
    if task is None:
        default = RecallTask()
        for count in range(default.num_facts, 0, -1):
            task = dataclasses.replace(default, num_facts=count, num_queries=count)
            try:
                check_recall(task, tokenizer, seq_len)
                break
            except BadInput:
                if count == 1:
                    raise
    assert task is not None
    return task


def make_questions(
    task: RecallTask, held_out: HeldOut, *, length: int, num_rows: int, seed: int = 0
) -> Questions:
    """Questions in rows of `length` tokens. Distances are as in training: short ones are frequent.

    Raises BadInput where the held-out text is shorter than a row.
    """
    check_recall(task, held_out.tokenizer, length)
    if held_out.documents.num_tokens < length:
        raise BadInput(
            f"the held-out text has {held_out.documents.num_tokens} tokens and a row of recall "
            f"takes {length}: give more with --data"
        )
    # Only answers are weighted, so that the weights show where they are.
    task = dataclasses.replace(task, count_text=False, answer_weight=1.0)
    key = derive("recall evaluation", length, seed)
    rows = RecallRows(task, held_out.tokenizer, held_out.documents, length, key)
    batch = stack_rows([rows.row(index) for index in range(num_rows)])
    found = []
    for row in range(num_rows):
        asked = np.flatnonzero(np.diff(batch.loss_weights[row] > 0, prepend=False, append=False))
        for begin, end in asked.reshape(-1, 2).tolist():
            whole = np.append(batch.tokens[row], batch.targets[row, -1])
            distance = _distance(whole, slice(begin + 1, end + 1), held_out.tokenizer)
            found.append((row, begin, end - begin, distance))
    columns = np.array(found, np.int64).T
    return Questions(batch.tokens, batch.targets, batch.valid, *columns)


def _distance(tokens: np.ndarray, answer: slice, tokenizer: Tokenizer) -> int:
    """How far before `tokens[answer]` its line was last told (or asked for, which tells it too)."""
    begin = answer.start
    prefix = next(
        n
        for n in range(1, begin + 1)
        if tokenizer.decode(tokens[begin - n : begin]).startswith(MARK)
    )
    line = tokens[begin - prefix : answer.stop]
    for at in range(begin - 1, prefix - 1, -1):
        if np.array_equal(tokens[at - prefix : at - prefix + len(line)], line):
            return begin - at
    raise AssertionError("the answer was not told")


def answer(engine: Engine, questions: Questions) -> tuple[np.ndarray, np.ndarray]:
    """For each question whether greedy decoding would answer right, and the share of the answer's
    tokens that are the likeliest ones after those before them."""
    correct = score_rows(engine, questions.tokens, questions.targets, questions.valid).correct
    share = np.array(
        [
            correct[row, begin : begin + length].mean()
            for row, begin, length in zip(
                questions.row, questions.begin, questions.length, strict=True
            )
        ]
    )
    return share == 1.0, share


def distance_edges(length: int, first: int = 0) -> list[int]:
    """`first`, then 16, 32, 64, ... as far as they are beyond it; in the end `length`."""
    return [first, *(16 << i for i in range(64) if first < 16 << i < length), length]


def accuracy_by_distance(
    right: Bool[np.ndarray, "Q"],
    share: Float[np.ndarray, "Q"],
    distance: Int[np.ndarray, "Q"],
    length: int,
    first: int = 0,
) -> list[dict[str, Any]]:
    """Accuracy of the questions whose distance is at least `from` and less than `to`."""
    rows = []
    edges = distance_edges(length, first)
    for begin, end in pairwise(edges):
        inside = (distance >= begin) & (distance < end)
        if inside.any():
            rows.append(
                {
                    "from": begin,
                    "to": end,
                    "accuracy": float(right[inside].mean()),
                    "token_accuracy": float(share[inside].mean()),
                    "questions": int(inside.sum()),
                }
            )
    return rows
