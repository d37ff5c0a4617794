"""`memtrain evaluate`: one task, measured through the decode path in cached chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from memtrain.errors import BadInput
from memtrain.evaluate import bits, generated, recall, reread
from memtrain.evaluate.subject import BATCH, Subject


Task = Literal["associative", "bpb", "copy", "facts", "mqar", "recall", "reread"]

MAX_TOKENS = 1 << 18
"""Tokens that one evaluation reads; of more text a part is taken, spread evenly."""
RECALL_ROWS = 128
REREAD_PIECES = 128


def evaluate(
    target: Path | str,
    *,
    task: Task,
    data: Sequence[Path | str] | None = None,
    context: int | None = None,
    without: Sequence[str] = (),
    settings: Sequence[str] = (),
    max_tokens: int = MAX_TOKENS,
) -> dict[str, Any]:
    """Measures a run's newest valid checkpoint, or an artifact.

    bpb: bits per byte of the held-out text (or of `data`), by tokens of context.
    facts: facts of a table, taught in training, answered right.
    associative, copy, mqar, recall: answers right, by distance from what was told to the question.
    reread: bits per byte of held-out text (or of `data`) read a first and a second time.
    context: tokens read from an empty memory (a row, of a generated task); as `Subject.context`
        unless given. Not of recall.
    without: memories that are left out, see `memtrain.model.ablation`.
    settings: "data.TASK.KEY=VALUE" in place of what the model was trained on: other facts, more
        pairs.

    Raises BadInput where the task does not fit what the model reads, or there is nothing to read.
    """
    subject = Subject.open(Path(target), settings)
    if context is not None:
        if task == "recall":
            raise BadInput("--task recall has rows of its own length: leave out --context")
        subject = dataclasses.replace(subject, context_tokens=context)
    paths = [Path(path) for path in data or ()]
    found = {
        "target": str(target),
        "step": subject.step,
        "task": task,
        "without": list(without),
        **({"settings": list(settings)} if settings else {}),
    }
    if task == "bpb":
        return found | _bits(subject, paths, without, max_tokens)
    if task == "recall":
        return found | _recall(subject, paths, without, max_tokens)
    if task == "reread":
        return found | _reread(subject, paths, without, max_tokens)
    if task in get_args(Task):
        if paths:
            raise BadInput(f"--task {task} is generated and reads no --data")
        return found | _generated(subject, task, without, max_tokens)
    *most, last = get_args(Task)
    raise BadInput(f"--task {task}: there are {', '.join(most)} and {last}")


def _bits(
    subject: Subject, paths: list[Path], without: Sequence[str], max_tokens: int
) -> dict[str, Any]:
    subject.need_tokenizer("bpb")
    held_out = subject.held_out(paths)
    # Who asks for so much context wants all of it to be read.
    asked = subject.context_tokens is not None
    pieces = bits.cut_pieces(held_out, subject.context, max_tokens, whole=asked)
    engine = subject.engine(without=without, batch=min(BATCH, len(pieces.tokens)))
    per_token = bits.bytes_per_token(pieces, held_out)
    nll = bits.piece_losses(engine, pieces)
    return {
        "bits_per_byte": bits.mean_bits(nll, pieces.valid, per_token),
        "files": len(held_out),
        "context": subject.context,
        "longest_piece": int(pieces.valid.sum(axis=1).max()),
        "tokens": pieces.num_targets,
        "tokens_held_out": held_out.documents.num_tokens,
        "bytes_per_token": per_token,
        "by_position": bits.bits_by_position(nll, pieces.valid, per_token),
    }


def _recall(
    subject: Subject, paths: list[Path], without: Sequence[str], max_tokens: int
) -> dict[str, Any]:
    task = recall.task_of(subject)
    engine = subject.engine(without=without)
    length = subject.experiment.train.seq_len
    questions = recall.make_questions(
        task,
        subject.held_out(paths),
        length=length,
        num_rows=max(1, min(RECALL_ROWS, max_tokens // length)),
    )
    right, share = recall.answer(engine, questions)
    return {
        "accuracy": float(right.mean()),
        "chance": float(recall.LETTERS) ** -task.value_len,
        "token_accuracy": float(share.mean()),
        "questions": len(right),
        "trained_on_recall": subject.experiment.data.recall is not None,
        "by_distance": recall.accuracy_by_distance(right, share, questions.distance, length),
    }


def _reread(
    subject: Subject, paths: list[Path], without: Sequence[str], max_tokens: int
) -> dict[str, Any]:
    subject.need_tokenizer("reread")
    held_out = subject.held_out(paths)
    count = max(1, min(REREAD_PIECES, max_tokens // subject.context))
    pieces = reread.reread_pieces(held_out, subject.context, count)
    engine = subject.engine(without=without, batch=min(BATCH, len(pieces)))
    num_bytes = sum(len(held_out.tokenizer.decode_bytes(piece)) for piece in pieces)
    twice = reread.reread(engine, pieces, num_bytes / pieces.size)
    return {
        "bits_per_byte_first": float(twice.first.mean()),
        "bits_per_byte_second": float(twice.second.mean()),
        "second_over_first": float(twice.second.mean() / twice.first.mean()),
        "pieces": len(pieces),
        "tokens_per_piece": pieces.shape[1],
        "by_position": reread.by_position(twice),
    }


def _generated(
    subject: Subject, name: str, without: Sequence[str], max_tokens: int
) -> dict[str, Any]:
    questions = generated.task_questions(subject, name, max_tokens)
    task = subject.experiment.data.generated[name]
    engine = subject.engine(without=without)
    right = generated.answer_task(engine, questions)
    found = {
        "accuracy": float(right.mean()),
        "chance": generated.chance_of(task),
        "questions": len(right),
    }
    if (questions.distances > 0).any():
        found["by_distance"] = generated.accuracy_by_distance(right, questions)
    return found
