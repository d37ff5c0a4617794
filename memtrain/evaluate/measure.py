"""Everything that a report shows of a model, measured with every memory on and each one off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from memtrain.data.pipeline import TextPipeline
from memtrain.data.tasks.recall import RecallExamples
from memtrain.decode.engine import Engine
from memtrain.errors import BadInput
from memtrain.evaluate import bits, generated, kinds, recall, slots
from memtrain.evaluate.answers import (
    Answered,
    Sample,
    answer_engine,
    answered,
    draw_prompts,
    draw_sample,
    greedy,
)
from memtrain.evaluate.baselines import MAX_TRAIN_BYTES, MarkovModels, xz_bits_per_byte
from memtrain.evaluate.reread import Reread, reread, reread_pieces
from memtrain.evaluate.slots import Reads, Slot
from memtrain.evaluate.subject import HeldOut, Subject
from memtrain.model.ablation import layer_label
from memtrain.model.language_model import full_pattern


ALL = "all"
"""Name of the setting in which nothing is left out."""
MAX_SETTINGS = 6
"""With every layer's memory of another kind there could be dozens."""


@dataclass(frozen=True)
class Budget:
    """How many tokens each part reads, for each setting."""

    bits: int = 32_768
    reread: int = 16_384
    recall: int = 20_480
    recall_beyond: int = 16_384
    slots: int = 16_384
    mqar: int = 65_536
    sample: int = 400


@dataclass
class Measured:
    """The numbers. Settings are "all" and the name of each memory that is left out."""

    subject: Subject
    settings: list[str]
    num_parameters: int
    bits: dict[str, float] = field(default_factory=dict)
    by_position: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    tokens_scored: int = 0
    bytes_scored: int = 0
    reread: dict[str, Reread] = field(default_factory=dict)
    distance: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Accuracy by distance: of recall in text, or of MQAR."""
    chance: float = 0.0
    trained_on_recall: bool = True
    kinds_title: str = ""
    kinds: list[dict[str, Any]] = field(default_factory=list)
    tables: list[tuple[Reads, list[Slot], list[Slot]]] = field(default_factory=list)
    answers: list[Answered] = field(default_factory=list)
    sample: Sample | None = None
    baselines: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What could not be measured, and why."""

    @property
    def table_memories(self) -> list[str]:
        """Settings without a memory that reads a learned table."""
        return [name for name in self.settings if name in _table_labels(self.subject)]


def measure(
    subject: Subject, *, budget: Budget, say: Callable[[str], None] = lambda line: None
) -> Measured:
    """Measures a model. What its text or tokenizer does not allow is left out and noted."""
    labels = list(subject.memories)
    measured = Measured(
        subject,
        [ALL, *labels[: MAX_SETTINGS - 1]],
        sum(leaf.size for leaf in jax.tree.leaves(subject.weights)),
    )
    if len(labels) >= MAX_SETTINGS:
        measured.notes.append(f"not switched off: {', '.join(labels[MAX_SETTINGS - 1 :])}")
    for name in subject.experiment.data.generated:
        _measure_generated(measured, name, budget)
        return measured
    with _noted(measured, "everything that takes held-out text"):
        held_out = subject.held_out()
        say(f"measuring {len(measured.settings)} settings on {len(held_out)} held-out files")
        _measure_text(measured, held_out, budget)
        _measure_baselines(measured, held_out, budget)
    return measured


@dataclass(frozen=True)
class _Material:
    """What every setting is given to read."""

    held_out: HeldOut
    pieces: bits.Pieces
    bytes_per_token: float
    twice: np.ndarray | None = None
    near: recall.Questions | None = None
    far: recall.Questions | None = None
    prompts: RecallExamples | None = None


@dataclass(frozen=True)
class _Found:
    """What one setting gave."""

    nll: np.ndarray
    reread: Reread | None
    distance: list[dict[str, Any]]
    answers: list[str] | None
    sample: Sample | None


def _measure_text(measured: Measured, held_out: HeldOut, budget: Budget) -> None:
    subject = measured.subject
    material = _prepare(measured, held_out, budget)
    pieces, per_token = material.pieces, material.bytes_per_token
    measured.tokens_scored = pieces.num_targets
    measured.bytes_scored = round(per_token * pieces.num_targets)

    # Most of the time goes into compiling, each program on one core: two settings side by side.
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(slots.record_reads, subject, pieces, budget.slots)
        found = dict(
            zip(
                measured.settings,
                pool.map(
                    lambda name: _measure_setting(subject, name, material, budget),
                    measured.settings,
                ),
                strict=True,
            )
        )
    for name, one in found.items():
        measured.bits[name] = bits.mean_bits(one.nll, pieces.valid, per_token)
        measured.by_position[name] = bits.bits_by_position(one.nll, pieces.valid, per_token)
        if one.reread is not None:
            measured.reread[name] = one.reread
        if one.distance:
            measured.distance[name] = one.distance
    for reads in reading.result():
        top, specific = slots.most_read(reads, pieces, held_out.tokenizer)
        measured.tables.append((reads, top, specific))
    if measured.table_memories:
        title, kind_names, of_target = kinds.kinds_of(held_out, pieces)
        names = (ALL, *measured.table_memories)
        measured.kinds_title = title
        measured.kinds = kinds.bits_by_kind(
            {name: found[name].nll for name in names}, of_target, kind_names, per_token
        )
    if material.prompts is not None:
        said = {name: one.answers for name, one in found.items() if one.answers is not None}
        measured.answers = answered(material.prompts, said, held_out.tokenizer)
    measured.sample = found[ALL].sample


def _prepare(measured: Measured, held_out: HeldOut, budget: Budget) -> _Material:
    """Draws what is read. What the text does not allow is noted and left out."""
    subject = measured.subject
    context, seq_len = subject.context, subject.experiment.train.seq_len
    pieces = bits.cut_pieces(held_out, context, budget.bits)
    drawn: dict[str, Any] = {}
    with _noted(measured, "reading twice"):
        count = max(1, budget.reread // context)
        drawn["twice"] = reread_pieces(held_out, context, count)
    with _noted(measured, "recall"):
        task = recall.task_of(subject)
        measured.chance = float(recall.LETTERS) ** -task.value_len
        measured.trained_on_recall = subject.experiment.data.recall is not None
        drawn["near"] = recall.make_questions(
            task, held_out, length=seq_len, num_rows=max(8, budget.recall // seq_len)
        )
        drawn["prompts"] = draw_prompts(subject, task, held_out)
        drawn["far"] = recall.make_questions(
            task,
            held_out,
            length=2 * seq_len,
            num_rows=max(8, budget.recall_beyond // (2 * seq_len)),
        )
    return _Material(held_out, pieces, bits.bytes_per_token(pieces, held_out), **drawn)


def _measure_setting(subject: Subject, name: str, material: _Material, budget: Budget) -> _Found:
    without = () if name == ALL else (name,)
    seq_len = subject.experiment.train.seq_len
    # One engine for all that is scored: programs are compiled once.
    engine = subject.engine(without=without, capacity=max(subject.context, 2 * seq_len))
    nll = bits.piece_losses(engine, material.pieces)
    twice, distance = None, []
    if material.twice is not None:
        twice = reread(engine, material.twice, material.bytes_per_token)
    if material.near is not None:
        distance = _recall(engine, material.near, material.far, seq_len)
    answers, sample = None, None
    if material.prompts is not None or name == ALL:
        engine = answer_engine(subject, without)
        if material.prompts is not None:
            prompts, count = material.prompts.prompts, material.prompts.answers.shape[1]
            answers = greedy(engine, prompts, count, material.held_out.tokenizer)
        if name == ALL:
            sample = draw_sample(subject, engine, material.held_out, num_tokens=budget.sample)
    return _Found(nll, twice, distance, answers, sample)


def _recall(
    engine: Engine, near: recall.Questions, far: recall.Questions | None, seq_len: int
) -> list[dict[str, Any]]:
    """Accuracy by distance. Of `far`, whose rows are twice as long as in training, only distances
    count that no row of training had."""
    right, share = recall.answer(engine, near)
    rows = recall.accuracy_by_distance(right, share, near.distance, seq_len)
    if far is not None:
        right, share = recall.answer(engine, far)
        beyond = far.distance >= seq_len
        rows += recall.accuracy_by_distance(
            right[beyond], share[beyond], far.distance[beyond], 2 * seq_len, first=seq_len
        )
    return rows


def _measure_generated(measured: Measured, task: str, budget: Budget) -> None:
    subject = measured.subject
    questions = generated.task_questions(subject, task, budget.mqar)
    measured.chance = generated.chance_of(subject.experiment.data.generated[task])
    measured.tokens_scored = int(questions.asked.sum())
    if not (questions.distances > 0).any():
        # Where nothing is told in the row, accuracy has no distance to be drawn against.
        measured.notes.append(
            f"no answer of data.{task} is in the row: memtrain evaluate says more"
        )
        return
    for name in measured.settings:
        engine = subject.engine(without=() if name == ALL else (name,))
        right = generated.answer_task(engine, questions)
        measured.distance[name] = generated.accuracy_by_distance(right, questions)


def _measure_baselines(measured: Measured, held_out: HeldOut, budget: Budget) -> None:
    """Markov models of the bytes that the model has read, on the bytes that it was measured on."""
    subject = measured.subject
    pieces = bits.cut_pieces(held_out, subject.context, budget.bits).in_bytes(held_out)
    pipeline = subject.pipeline
    assert isinstance(pipeline, TextPipeline)
    num_samples = (subject.step or 0) * subject.experiment.train.batch_size
    models = MarkovModels(_read_once(pipeline, num_samples))
    epochs = num_samples / pipeline.rows_per_epoch
    measured.baselines = [
        {
            "model": "this model",
            "bits_per_byte": measured.bits[ALL],
            "parameters": measured.num_parameters,
            "read_bytes": models.num_bytes,
            "scored_bytes": measured.bytes_scored,
        }
    ]
    if epochs > 1:
        measured.notes.append(
            f"the model read its text {epochs:.1f} times, the Markov models count it once"
        )
    for order, found in enumerate(models.bits_per_byte(pieces)):
        measured.baselines.append(
            {
                "model": f"Markov order {order}",
                "bits_per_byte": found,
                "parameters": models.num_grams[order],
                "read_bytes": models.num_bytes,
                "scored_bytes": measured.bytes_scored,
            }
        )
    files = [held_out.content(document) for document in range(len(held_out))]
    measured.baselines.append(
        {
            "model": "xz -9e, file by file",
            "bits_per_byte": xz_bits_per_byte(files),
            "parameters": 0,
            "read_bytes": 0,
            "scored_bytes": sum(map(len, files)),
        }
    )


def _read_once(pipeline: TextPipeline, num_samples: int) -> Iterator[np.ndarray]:
    """As much text as the samples hold, each byte once, `MAX_TRAIN_BYTES` at most."""
    # Counting a text twice would make a Markov model surer than it should be.
    total = 0
    for piece in pipeline.text_read(min(num_samples, pipeline.rows_per_epoch)):
        if total >= MAX_TRAIN_BYTES:
            return
        total += len(piece)
        yield piece


def _table_labels(subject: Subject) -> set[str]:
    return {
        layer_label(layer)
        for block in full_pattern(subject.experiment.model)
        for layer in (block.mixer, block.ffn)
        if layer is not None and layer.tables()
    }


@contextmanager
def _noted(measured: Measured, what: str) -> Iterator[None]:
    """What this text does not allow is told in the report, and nothing else is lost for it."""
    try:
        yield
    except BadInput as error:
        measured.notes.append(f"{what} was left out: {error}")
