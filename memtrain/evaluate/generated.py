"""Tasks instead of text: are the answers right, and how far back could they be known?"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from memtrain.data.config import AssociativeTask, CopyTask, FactsTask, GeneratedTask
from memtrain.data.pipeline import GeneratedPipeline
from memtrain.decode.engine import Engine
from memtrain.errors import BadInput
from memtrain.evaluate.recall import distance_edges
from memtrain.evaluate.scoring import score_rows
from memtrain.evaluate.subject import Subject


@dataclass(frozen=True)
class TaskQuestions:
    """Held-out rows, where in them something is asked, and how far back the answer is."""

    tokens: Int[np.ndarray, "N T"]
    targets: Int[np.ndarray, "N T"]
    valid: Bool[np.ndarray, "N T"]
    starts: Bool[np.ndarray, "N T"]
    asked: Bool[np.ndarray, "N T"]
    distances: Int[np.ndarray, "N T"]
    """0 where nothing is asked, and where the answer is not in the row."""


def task_questions(subject: Subject, name: str, max_tokens: int) -> TaskQuestions:
    """Held-out rows that hold `max_tokens` together: the first ones, for rows are in no order.

    Raises BadInput where the model was not trained on the task.
    """
    data = subject.experiment.data
    if name not in data.generated:
        other = ", ".join(f"--task {trained}" for trained in data.generated) or "--task recall"
        reads = f"reads text with tokenizer {data.tokenizer!r} and " if not data.generated else ""
        raise BadInput(
            f"--task {name}: {subject.path} {reads}was not trained on data.{name}: take {other}"
        )
    pipeline = subject.pipeline
    assert isinstance(pipeline, GeneratedPipeline)
    count = min(pipeline.num_validation_rows, max(1, max_tokens // pipeline.seq_len))
    batch, distances = pipeline.questions(0, count)
    asked = batch.loss_weights > 0
    return TaskQuestions(batch.tokens, batch.targets, batch.valid, batch.starts, asked, distances)


def answer_task(engine: Engine, questions: TaskQuestions) -> Bool[np.ndarray, "Q"]:
    """Whether each question's answer is the likeliest token, in order of row and column."""
    found = score_rows(
        engine, questions.tokens, questions.targets, questions.valid, starts=questions.starts
    )
    return found.correct[questions.asked]


def chance_of(task: GeneratedTask) -> float:
    """Share of right answers of one who knows what answers look like, and no more."""
    match task:
        case FactsTask():
            return 1 / task.num_values
        case CopyTask():
            return 1 / (task.vocab_size - 1 - task.noise_tokens)
        case _:
            # Values are half of what is not noise.
            noise = 1 + task.noise_tokens if isinstance(task, AssociativeTask) else 0
            return 1 / (task.vocab_size - noise - (task.vocab_size - noise) // 2)


def accuracy_by_distance(
    right: Bool[np.ndarray, "Q"], questions: TaskQuestions
) -> list[dict[str, Any]]:
    """Accuracy of the questions whose distance is at least `from` and less than `to`."""
    distance = questions.distances[questions.asked]
    edges = distance_edges(questions.tokens.shape[1])
    rows = []
    for begin, end in pairwise(edges):
        inside = (distance >= max(begin, 1)) & (distance < end)
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
