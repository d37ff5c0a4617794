"""Starting from the parameters of another run or of an exported artifact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from memtrain.errors import BadInput
from memtrain.train import records
from memtrain.train.checkpoint import CheckpointStore
from memtrain.train.state import Plan, TrainState


Shape = tuple[tuple[int, ...], str]
"""Dimensions and dtype of an array."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A run or artifact to start from: opened and found fit, its arrays not read yet."""

    name: str
    has: dict[str, Shape]
    fits: set[str]
    wanted: set[str]
    read: Callable[[set[str]], Mapping[str, Any]]

    def into(self, state: TrainState, plan: Plan, say: Callable[[str], None]) -> TrainState:
        """`state` with every parameter that fits. Lists what does not."""
        shardings = plan.skeleton.shardings(plan.mesh)
        arrays = self.read(self.fits)
        loaded = {name: jax.device_put(arrays[name], shardings[name]) for name in self.fits}
        say(f"{len(loaded)} of {len(self.wanted)} parameters from {self.name}")
        for title, names in (
            ("fresh", self.wanted - self.fits),
            ("unused", self.has.keys() - self.fits),
        ):
            if names:
                say(f"  {title}: {', '.join(sorted(names))}")
        parameters = state.parameters | loaded
        # The optimizer may keep a copy of what it updates.
        init = jax.jit(plan.init_optimizer, out_shardings=plan.shardings().optimizer)
        return dataclasses.replace(state, parameters=parameters, optimizer=init(parameters))


def open_source(source: str, plan: Plan) -> Source:
    """Finds what `source` has under the same name, shape and dtype as the model.

    Raises BadInput where there is no such run or artifact, or nothing in it fits.
    """
    path = Path(source)
    if not path.exists():
        raise BadInput(f"train.init_from={source}: no such run or artifact")
    has, read = _artifact(path) if (path / "manifest.json").exists() else _run(path, plan)
    wanted = {name: _shape(leaf) for name, leaf in plan.skeleton.shapes.items()}
    fits = {name for name, shape in has.items() if wanted.get(name) == shape}
    if not fits:
        raise BadInput(
            f"train.init_from={source}: none of its {len(has)} parameters fits this model"
        )
    return Source(source, has, fits, set(wanted), read)


def _shape(leaf: Any) -> Shape:
    return tuple(leaf.shape), str(leaf.dtype)


def _run(path: Path, plan: Plan):
    records.need_experiment(path)
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

    def read(names: set[str]) -> Mapping[str, Any]:
        # Every process reads its own part, straight to where it belongs.
        shapes, shardings = plan.skeleton.shapes, plan.skeleton.shardings(plan.mesh)
        abstract = {
            name: jax.ShapeDtypeStruct(
                shapes[name].shape, shapes[name].dtype, sharding=shardings[name]
            )
            for name in names
        }
        return store.restore_partial(step, {"parameters": abstract})["parameters"]

    return has, read


def _artifact(path: Path):
    from memtrain.decode.artifact import Artifact
    from memtrain.model.parameters import parameters_of

    arrays = {
        name: np.asarray(array)
        for name, array in parameters_of(Artifact.load(path).stacked_model()).items()
    }
    return {name: _shape(array) for name, array in arrays.items()}, lambda names: arrays
