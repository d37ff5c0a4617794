"""An experiment: everything that a run is made of, in one frozen tree of dataclasses.

A recipe returns one, the command line overrides its leaves, and the resolved tree is written as
JSON into the run and into every checkpoint. Imports no JAX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from memtrain.data.config import DataConfig
from memtrain.errors import BadInput
from memtrain.model.config import ModelConfig
from memtrain.overrides import override
from memtrain.parallel.config import MeshConfig
from memtrain.schema import from_dict, register, to_dict
from memtrain.train.config import OptimizerConfig, TrainConfig


__all__ = [
    "OPERATIONAL",
    "Experiment",
    "check_resume",
    "diff",
    "from_dict",
    "is_operational",
    "override",
    "register",
    "resolve_horizon",
    "to_dict",
]

OPERATIONAL = (
    "mesh.*",
    "model.loss_chunk_tokens",
    "model.remat",
    "model.scan_unroll",
    "data.prefetch",
    "optimizer.horizon_steps",
    "train.num_steps",
    "train.checkpoint_every_steps",
    "train.checkpoint_lag_steps",
    "train.keep_*",
    "train.log_*",
    "train.evaluate_*",
    "train.max_skipped_steps",
    "train.profile_steps",
    "train.tensorboard",
)
"""Fields, as globs over keys, that may change when a run resumes: where, how long and how closely
watched it runs. All others say what is learned from what, and are its identity."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One training run, before it begins. Raises `BadInput` where two sections do not fit."""

    name: str
    """Names the run directory, runs/NAME, unless --run-dir is given."""
    model: ModelConfig
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self):
        # The types were not checked yet where a recipe calls this: `validated` comes afterwards.
        if not isinstance(self.name, str) or self.name in ("", ".", "..") or "/" in self.name:
            raise BadInput(f"name={self.name!r} must be usable as the name of a folder")
        mesh, train = self.mesh.sizes, self.train
        for axis, size in mesh.items():
            if not isinstance(size, int) or size < 1:
                raise BadInput(f"mesh.{axis}={size!r} must be a whole number of at least 1")
        for key in ("batch_size", "seq_len", "accumulation_steps"):
            if not isinstance(getattr(train, key), int) or getattr(train, key) < 1:
                raise BadInput(
                    f"train.{key}={getattr(train, key)!r} must be a whole number of at least 1"
                )
        parts = mesh["data"] * mesh["fsdp"] * train.accumulation_steps
        if train.batch_size % parts:
            below = train.batch_size // parts * parts
            near = f"{below} or {below + parts}" if below else f"{parts}"
            raise BadInput(
                f"train.batch_size={train.batch_size} cannot be divided into {parts} equal parts "
                f"(mesh.data={mesh['data']} * mesh.fsdp={mesh['fsdp']} * "
                f"train.accumulation_steps={train.accumulation_steps}): take {near}"
            )
        if train.carry != "none" and self.data.order != "document":
            raise BadInput(
                f'train.carry="{train.carry}" carries the memory from step to step and needs rows '
                f'that go on where they stopped: set data.order="document", not '
                f'"{self.data.order}"'
            )
        if train.carry == "tbptt" and mesh["context"] > 1:
            raise BadInput(
                f'train.carry="tbptt" reads a row in parts, and mesh.context={mesh["context"]} '
                'splits it over devices: set mesh.context=1, or train.carry="stop"'
            )

    @property
    def num_devices(self) -> int:
        """Devices in the mesh, over all processes."""
        return self.mesh.num_devices


def validated(experiment: Experiment, *, source: str = "") -> Experiment:
    """The experiment with every field's type checked, and numbers as their annotation has them.

    Dataclasses take any value from a recipe; this catches `num_steps="100"` by name.
    """
    return from_dict(Experiment, to_dict(experiment), source=source)


def diff(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of every leaf that differs, as JSON values; None where missing.

    Takes configurations or the dicts made of them. Parts of another type or length count as one.
    """
    old = old if isinstance(old, Mapping) else to_dict(old)
    new = new if isinstance(new, Mapping) else to_dict(new)
    return list(_differences(old, new, ""))


def _differences(old: Any, new: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    if _alike(old, new) and isinstance(old, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            place = f"{where}.{key}" if where else key
            yield from _differences(old.get(key), new.get(key), place)
    elif _alike(old, new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _differences(a, b, f"{where}.{index}")
    elif old != new:
        yield where, old, new


def _alike(old: Any, new: Any) -> bool:
    """Whether two JSON values can be compared part by part."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return old.get("type") == new.get("type")
    lists = isinstance(old, list | tuple) and isinstance(new, list | tuple)
    return lists and len(old) == len(new) and any(isinstance(v, Mapping) for v in old)


def is_operational(key: str) -> bool:
    """Whether the field may change when a run resumes."""
    return any(fnmatchcase(key, pattern) for pattern in OPERATIONAL)


def check_resume(
    stored: Experiment | Mapping[str, Any], current: Experiment
) -> list[tuple[str, Any, Any]]:
    """The operational differences of a run that resumes, to be printed: (key, stored, current).

    Raises `BadInput` that names the identity fields that differ, with both values. Call it after
    `resolve_horizon`. A stored dict of an older version may lack fields: their defaults count.
    """
    if isinstance(stored, Mapping):
        stored = from_dict(Experiment, stored, source="the run's configuration")
    differences = diff(validated(stored), validated(current))
    changed = [d for d in differences if not is_operational(d[0])]
    if changed:
        listed = "; ".join(f"{key} was {_brief(a)} and is {_brief(b)}" for key, a, b in changed)
        raise BadInput(
            f"this run was begun as another experiment: {listed}. "
            "Change it back to resume, or give another --run-dir to begin anew"
        )
    return differences


def resolve_horizon(
    stored: Experiment | Mapping[str, Any] | None, current: Experiment
) -> Experiment:
    """`current` with the length of its schedule fixed, so that more steps do not bend the past.

    The horizon is what `optimizer.horizon_steps` says; unset, that of the stored run; in a new run
    (`stored=None`), `train.num_steps`.
    """
    if current.optimizer.horizon_steps is not None:
        return current
    if isinstance(stored, Mapping):
        stored = from_dict(Experiment, stored, source="the run's configuration")
    begun = stored or current
    horizon = begun.optimizer.horizon_steps
    horizon = begun.train.num_steps if horizon is None else horizon
    optimizer = dataclasses.replace(current.optimizer, horizon_steps=horizon)
    return dataclasses.replace(current, optimizer=optimizer)


def _brief(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
