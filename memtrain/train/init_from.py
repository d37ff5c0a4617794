"""Starting from the parameters of another run or of an exported artifact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from memtrain.errors import BadInput
from memtrain.train import records
from memtrain.train.checkpoint import CheckpointStore
from memtrain.train.state import Plan, TrainState


def initialise_from(
    source: str, plan: Plan, state: TrainState, say: Callable[[str], None]
) -> TrainState:
    """`state` with every parameter that `source` has under the same name, shape and dtype.

    Lists what did not match. Raises BadInput where nothing does.
    """
    path = Path(source)
    if not path.exists():
        raise BadInput(f"train.init_from={source}: no such run or artifact")
    wanted = plan.skeleton.shapes
    found = _from_artifact(path) if (path / "manifest.json").exists() else _from_run(path, plan)
    fits = {
        name: array
        for name, array in found.items()
        if name in wanted
        and array.shape == wanted[name].shape
        and array.dtype == wanted[name].dtype
    }
    if not fits:
        raise BadInput(
            f"train.init_from={source}: none of its {len(found)} parameters fits this model"
        )
    shardings = plan.skeleton.shardings(plan.mesh)
    loaded = {name: jax.device_put(array, shardings[name]) for name, array in fits.items()}
    say(f"{len(loaded)} of {len(wanted)} parameters from {source}")
    for title, names in (
        ("fresh", wanted.keys() - fits.keys()),
        ("unused", found.keys() - fits.keys()),
    ):
        if names:
            say(f"  {title}: {', '.join(sorted(names))}")
    return dataclasses.replace(state, parameters=state.parameters | loaded)


def _from_run(path: Path, plan: Plan) -> dict[str, jax.Array]:
    records.need_experiment(path)
    store = CheckpointStore(path / records.CHECKPOINTS)
    candidate = store.newest_valid()
    if candidate is None:
        raise BadInput(f"train.init_from={path}: the run has no checkpoint yet")
    prefix = "parameters/"
    wanted = plan.skeleton.shapes
    abstract = {
        name.removeprefix(prefix): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in store.leaves(candidate.step).items()
        if name.startswith(prefix) and name.removeprefix(prefix) in wanted
    }
    return store.restore_partial(candidate.step, {"parameters": abstract})["parameters"]


def _from_artifact(path: Path) -> dict[str, np.ndarray]:
    from memtrain.decode.artifact import Artifact
    from memtrain.model.parameters import parameters_of

    return {n: np.asarray(a) for n, a in parameters_of(Artifact.load(path).stacked_model()).items()}
