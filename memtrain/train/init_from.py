"""Starting from the parameters of another run or of an exported artifact."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from memtrain.config import Experiment
from memtrain.errors import BadInput
from memtrain.train import records
from memtrain.train.checkpoint import CheckpointStore
from memtrain.train.state import Plan, TrainState


Shape = tuple[tuple[int, ...], str]
"""Dimensions and dtype of an array."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A run or artifact to start from: opened and found fit, its arrays not read yet.

    experiment: what it was made by. has: all that is there. fits: of the model's parameters those
    that it gives, under the name that they have there. wanted: all of the model's.
    """

    name: str
    experiment: Experiment
    has: dict[str, Shape]
    fits: dict[str, str]
    wanted: set[str]
    read: Callable[[Mapping[str, str]], Mapping[str, Any]]
    """Takes `fits`."""

    def into(self, state: TrainState, plan: Plan, say: Callable[[str], None]) -> TrainState:
        """`state` with every parameter that fits. Lists what does not."""
        shardings = plan.parameter_shardings()
        arrays = self.read(self.fits)
        # What is read under two names is copied: the step gives its arguments away, each once.
        uses = Counter(self.fits.values())
        loaded = {
            name: jax.device_put(
                arrays[name], shardings[name], may_alias=False if uses[old] > 1 else None
            )
            for name, old in self.fits.items()
        }
        say(f"{len(loaded)} of {len(self.wanted)} parameters from {self.name}")
        for title, names in (
            ("fresh", self.wanted - self.fits.keys()),
            ("unused", self.has.keys() - set(self.fits.values())),
        ):
            if names:
                say(f"  {title}: {', '.join(sorted(names))}")
        parameters = state.parameters | loaded
        # The optimizer may keep a copy of what it updates.
        return dataclasses.replace(
            state, parameters=parameters, optimizer=plan.placed_optimizer(parameters)
        )


def experiment_at(source: str) -> Experiment:
    """What a run or artifact was made by. Raises BadInput where there is none."""
    path = Path(source)
    if (path / "manifest.json").exists():
        from memtrain.decode.artifact import Artifact

        return Artifact.load(path).experiment
    if not path.exists():
        raise BadInput(f"{source}: no such run or artifact")
    return records.need_experiment(path)


def open_source(source: str, plan: Plan) -> Source:
    """Finds what `source` has under the same name, shape and dtype as the model.

    Raises BadInput where there is no such run or artifact, or nothing in it fits.
    """
    path = Path(source)
    if not path.exists():
        raise BadInput(f"train.init_from={source}: no such run or artifact")
    found = _artifact(path) if (path / "manifest.json").exists() else _run(path, plan)
    experiment, has, read = found
    wanted = {name: _shape(leaf) for name, leaf in plan.skeleton.shapes.items()}
    there = _renamed(plan.experiment.train.init_rename, wanted, has)
    fits = {name: old for name, old in there.items() if has.get(old) == wanted[name]}
    if not fits:
        raise BadInput(
            f"train.init_from={source}: none of its {len(has)} parameters fits this model"
        )
    return Source(source, experiment, has, fits, set(wanted), read)


def _renamed(
    entries: Sequence[str], wanted: Mapping[str, Shape], has: Mapping[str, Shape]
) -> dict[str, str]:
    """What each of the model's parameters is called at the source. The longest beginning counts."""
    pairs = dict(entry.split("=") for entry in entries)
    if len(pairs) < len(entries):
        raise BadInput("train.init_rename names the same parameters twice: give each NEW once")
    for new, old in pairs.items():
        for beginning, names, where in ((new, wanted, "this model"), (old, has, "the source")):
            if not any(name.startswith(beginning) for name in names):
                raise BadInput(
                    f"train.init_rename={new}={old}: no parameter of {where} begins with "
                    f"{beginning!r}; names look like {min(names)!r}"
                )
    renamed = {}
    for name in wanted:
        if found := [new for new in pairs if name.startswith(new)]:
            new = max(found, key=len)
            renamed[name] = pairs[new] + name.removeprefix(new)
    # What moved is not also what now stands where it stood.
    moved = set(renamed.values())
    return {name: name for name in wanted if name not in moved} | renamed


def _shape(leaf: Any) -> Shape:
    return tuple(leaf.shape), str(leaf.dtype)


def _run(path: Path, plan: Plan):
    experiment = records.need_experiment(path)
    store = CheckpointStore(path / records.CHECKPOINTS)
    candidate = store.newest_valid()
    if candidate is None:
        raise BadInput(f"train.init_from={path}: the run has no checkpoint yet")
    step, prefix = candidate.step, "parameters/"
    has = {
        name.removeprefix(prefix): _shape(leaf)
        for name, leaf in store.leaves(step).items()
        if name.startswith(prefix)
    }

    def read(names: Mapping[str, str]) -> Mapping[str, Any]:
        # Every process reads its own part, straight to where it belongs.
        shapes, shardings = plan.skeleton.shapes, plan.parameter_shardings()
        abstract = {
            old: jax.ShapeDtypeStruct(
                shapes[name].shape, shapes[name].dtype, sharding=shardings[name]
            )
            for name, old in names.items()
        }
        found = store.restore_partial(step, {"parameters": abstract})["parameters"]
        return {name: found[old] for name, old in names.items()}

    return experiment, has, read


def _artifact(path: Path):
    from memtrain.decode.artifact import Artifact
    from memtrain.model.parameters import parameters_of

    artifact = Artifact.load(path)
    arrays = {
        name: np.asarray(array) for name, array in parameters_of(artifact.stacked_model()).items()
    }
    has = {name: _shape(array) for name, array in arrays.items()}
    return (
        artifact.experiment,
        has,
        lambda names: {name: arrays[old] for name, old in names.items()},
    )
