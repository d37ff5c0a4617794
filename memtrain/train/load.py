"""A trained model from a run directory: the parameters of a checkpoint, and nothing else of it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from memtrain.config import Experiment
from memtrain.data.tokenizer import Tokenizer, load_tokenizer
from memtrain.errors import BadInput
from memtrain.model.language_model import LanguageModel
from memtrain.model.parameters import Skeleton
from memtrain.train import records
from memtrain.train.checkpoint import CheckpointStore


class LoadedModel(NamedTuple):
    """What a run had learned at one step."""

    experiment: Experiment
    model: LanguageModel
    tokenizer: Tokenizer | None
    """None where tokens are numbers (MQAR)."""
    step: int

    @property
    def vocab_size(self) -> int:
        """Of the model; the tokenizer's may be smaller."""
        return self.model.vocab_size


def load_model(run_dir: Path, step: int | None = None) -> LoadedModel:
    """The model of a checkpoint: the newest valid one, or that of `step`.

    Raises BadInput where there is no run or no checkpoint yet, CheckpointError where there is none
    of that step, or it is damaged.
    """
    experiment = records.need_experiment(run_dir)
    store = CheckpointStore(run_dir / records.CHECKPOINTS)
    if step is None:
        candidate = store.newest_valid()
        if candidate is None:
            raise BadInput(f"{run_dir} has no checkpoint yet: train it first")
        step, metadata = candidate.step, candidate.metadata
    else:
        metadata = store.metadata(step)
    skeleton = Skeleton.of(experiment.model, int(metadata["vocab_size"]))
    restored = store.restore_partial(step, {"parameters": skeleton.shapes})
    tokenizer = None if experiment.data.mqar else load_tokenizer(experiment.data.tokenizer)
    return LoadedModel(experiment, skeleton.merge(restored["parameters"]), tokenizer, step)
