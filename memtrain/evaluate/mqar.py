"""MQAR: accuracy by the distance between a pair and the question for it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from memtrain.data.pipeline import MqarPipeline
from memtrain.decode.engine import Engine
from memtrain.errors import BadInput
from memtrain.evaluate.recall import distance_edges
from memtrain.evaluate.scoring import score_rows
from memtrain.evaluate.subject import Subject


@dataclass(frozen=True)
class MqarQuestions:
    """Held-out rows, and for every token how far back its pair is (0: nothing is asked)."""

    tokens: Int[np.ndarray, "N T"]
    targets: Int[np.ndarray, "N T"]
    valid: Bool[np.ndarray, "N T"]
    distances: Int[np.ndarray, "N T"]


def mqar_questions(subject: Subject, max_tokens: int) -> MqarQuestions:
    """The first held-out rows that hold `max_tokens` together.

    Raises BadInput where the model was not trained on MQAR.
    """
    if subject.experiment.data.mqar is None:
        raise BadInput(
            f"--task mqar: {subject.path} reads text with tokenizer "
            f"{subject.experiment.data.tokenizer!r} and was not trained on data.mqar: "
            "take --task recall"
        )
    pipeline = subject.pipeline
    assert isinstance(pipeline, MqarPipeline)
    count = min(pipeline.num_validation_rows, max(1, max_tokens // pipeline.seq_len))
    found = pipeline.mqar_validation(0, count)
    batch = found.batch
    return MqarQuestions(batch.tokens, batch.targets, batch.valid, found.distances)


def answer_mqar(engine: Engine, questions: MqarQuestions) -> Bool[np.ndarray, "Q"]:
    """Whether each question's answer is the likeliest token, in order of row and column."""
    found = score_rows(engine, questions.tokens, questions.targets, questions.valid)
    return found.correct[questions.distances > 0]


def mqar_accuracy(right: Bool[np.ndarray, "Q"], questions: MqarQuestions) -> list[dict[str, Any]]:
    """Accuracy of the questions whose distance is at least `from` and less than `to`."""
    distance = questions.distances[questions.distances > 0]
    edges = distance_edges(questions.tokens.shape[1])
    rows = []
    for begin, end in pairwise(edges):
        inside = (distance >= begin) & (distance < end)
        if inside.any():
            rows.append(
                {
                    "from": begin,
                    "to": end,
                    "accuracy": float(right[inside].mean()),
                    "questions": int(inside.sum()),
                }
            )
    return rows
