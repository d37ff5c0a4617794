"""What is evaluated: the model of a run or an artifact, its decode engines, its held-out text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from memtrain.config import Experiment, override
from memtrain.data.corpus import Documents, build_corpus
from memtrain.data.fingerprint import check_fingerprint
from memtrain.data.pipeline import GeneratedPipeline, TextPipeline, build_pipeline
from memtrain.data.tokenizer import Tokenizer
from memtrain.decode.artifact import MANIFEST, Artifact
from memtrain.decode.engine import Engine
from memtrain.errors import BadInput
from memtrain.model.ablation import memory_names
from memtrain.model.unstacked import Unstacked, unstack_model
from memtrain.train.load import load_model
from memtrain.train.records import CONFIG, read_run


CHUNK = 256
"""Tokens of one call of the engine."""
BATCH = 16
"""Rows that are read side by side."""
CARRIED_CONTEXTS = 8
"""A model that was trained to carry its memory is measured over this many rows' length."""


@dataclass(frozen=True)
class Subject:
    """A model with all that is needed to measure it."""

    path: Path
    weights: Unstacked
    experiment: Experiment
    vocab_size: int
    tokenizer: Tokenizer | None
    """None where tokens are numbers (a task that stands instead of text)."""
    step: int | None
    fingerprint: Mapping[str, Any] | None = None
    """Of the data that a run was trained on; an artifact knows none."""
    context_tokens: int | None = None
    """What `context` is instead of what training says."""

    @classmethod
    def open(cls, target: Path, settings: Sequence[str] = ()) -> Subject:
        """An artifact, or a run, of which the newest valid checkpoint is taken.

        settings: "data.TASK.KEY=VALUE" of the task that the model was trained on, to be measured on
        other data of it.
        Raises BadInput where `target` is neither, or holds no valid model.
        """
        subject = cls._opened(target)
        if not settings:
            return subject
        tasks = [f"data.{name}." for name in subject.experiment.data.generated]
        for setting in settings:
            if not setting.startswith(tuple(tasks)):
                known = f"{tasks[0]}KEY=VALUE" if tasks else "give other text with --data"
                raise BadInput(
                    f"--set {setting}: a trained model's settings stand, but for those of a task "
                    f"that stands instead of text: {known}"
                )
        experiment = override(subject.experiment, settings)
        return dataclasses.replace(subject, experiment=experiment, fingerprint=None)

    @classmethod
    def _opened(cls, target: Path) -> Subject:
        if (target / MANIFEST).exists():
            artifact = Artifact.load(target)
            step = artifact.manifest["created_from"].get("step")
            return cls(
                target,
                artifact.weights(),
                artifact.experiment,
                artifact.vocab_size,
                None if artifact.experiment.data.generated else artifact.tokenizer,
                step,
            )
        if not (target / CONFIG).exists():
            raise BadInput(
                f"{target} is neither a run nor an exported model: "
                f"it has no {CONFIG} and no {MANIFEST}"
            )
        loaded = load_model(target)
        return cls(
            target,
            unstack_model(loaded.model),
            loaded.experiment,
            loaded.vocab_size,
            None if loaded.experiment.data.generated else loaded.tokenizer,
            loaded.step,
            read_run(target).get("fingerprint"),
        )

    @property
    def context(self) -> int:
        """Tokens of a row that is read from an empty memory: as many as in training, unless it was
        asked for others."""
        if self.context_tokens is not None:
            return self.context_tokens
        train = self.experiment.train
        return train.seq_len * (1 if train.carry == "none" else CARRIED_CONTEXTS)

    @cached_property
    def memories(self) -> tuple[str, ...]:
        """Names of the memories, to be left out one at a time."""
        return tuple(memory_names(self.experiment.model))

    @cached_property
    def pipeline(self) -> TextPipeline | GeneratedPipeline:
        """What the run reads. Raises BadInput where its data are not on this machine, or others
        than it was trained on: what was held out then may have been learned since.
        """
        train, data = self.experiment.train, self.experiment.data

        def build(seq_len: int) -> TextPipeline | GeneratedPipeline:
            return build_pipeline(
                data, seq_len=seq_len, batch_size=train.batch_size, seed=train.seed
            )

        # Rows of a generated task are as long as is asked for; pieces of text are cut from it.
        length = train.seq_len
        if data.generated and self.context_tokens is not None:
            length = self.context_tokens
        pipeline = build(length)
        if self.fingerprint is not None:
            trained = pipeline if length == train.seq_len else build(train.seq_len)
            try:
                check_fingerprint(self.fingerprint, trained.fingerprint())
            except BadInput as error:
                raise BadInput(
                    f"{self.path}: {error}; or measure on other text with --data"
                ) from None
        if pipeline.vocab_size > self.vocab_size:
            raise BadInput(
                f"{self.path}: the data has {pipeline.vocab_size} token ids, and the model knows "
                f"{self.vocab_size}"
            )
        return pipeline

    def engine(
        self,
        *,
        without: Sequence[str] = (),
        batch: int = BATCH,
        capacity: int | None = None,
        chunk: int = CHUNK,
        want_reads: bool = False,
    ) -> Engine:
        return Engine(
            self.weights,
            batch=batch,
            capacity=capacity or self.context,
            chunk=min(chunk, capacity or self.context),
            without=without,
            want_reads=want_reads,
        )

    def need_tokenizer(self, task: str) -> Tokenizer:
        if self.tokenizer is None:
            other = " or ".join(f"--task {name}" for name in self.experiment.data.generated)
            if not other:
                raise BadInput(
                    f"--task {task}: {self.path} has no tokenizer, and reads no text: import it "
                    "from a folder with a tokenizer.json"
                )
            raise BadInput(
                f"--task {task}: {self.path} was trained on a generated task, whose tokens are "
                f"numbers and no text: take {other}"
            )
        return self.tokenizer

    def held_out(self, paths: Sequence[Path] = ()) -> HeldOut:
        """The text to measure on: what the run held out, or all of `paths`.

        Raises BadInput where there is none.
        """
        tokenizer = self.need_tokenizer("bpb")
        data = self.experiment.data
        if paths:
            corpus = build_corpus(
                tuple(str(path) for path in paths), tokenizer, text_field=data.text_field
            )
            ids, documents = corpus.split("train", 0.0, joined=data.join_documents)
            held_out = HeldOut(tokenizer, [corpus.names[i] for i in ids], documents)
            place = f"--data {','.join(str(path) for path in paths)}"
        else:
            assert isinstance(self.pipeline, TextPipeline)
            names = [name for name, _ in self.pipeline.validation_documents()]
            held_out = HeldOut(tokenizer, names, self.pipeline.held_out_documents())
            place = f"{self.path} (data.validation_fraction={data.validation_fraction})"
        if held_out.documents.num_tokens < 2:
            raise BadInput(f"{place} holds no text to measure on: give --data PATH")
        return held_out


@dataclass(frozen=True)
class HeldOut:
    """Documents that the model was not trained on."""

    tokenizer: Tokenizer
    names: list[str]
    documents: Documents

    def __len__(self) -> int:
        return len(self.names)

    def tokens(self, document: int) -> np.ndarray:
        """int32 [n]."""
        d = self.documents
        return np.asarray(d.tokens[d.begins[document] : d.ends[document]], np.int32)

    def content(self, document: int) -> bytes:
        return self.tokenizer.decode_bytes(self.tokens(document))
