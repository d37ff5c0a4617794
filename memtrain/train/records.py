"""The small files of a run directory: config.json and run.json."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import jax

from memtrain.config import Experiment, from_dict, to_dict
from memtrain.errors import BadInput
from memtrain.files import write_whole
from memtrain.recipe import experiment_of_run


CONFIG = "config.json"
RUN = "run.json"
CHECKPOINTS = "checkpoints"
_VERSIONS = ("memtrain", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def read_experiment(run_dir: Path) -> Experiment | None:
    """The experiment that a run directory was begun with; None if there is no run in it."""
    path = run_dir / CONFIG
    if not path.exists():
        return None
    return from_dict(Experiment, _read(path), source=str(path))


def need_experiment(run_dir: Path) -> Experiment:
    """Raises BadInput where `run_dir` holds no run."""
    if not run_dir.is_dir():
        raise BadInput(f"{run_dir}: no such run directory")
    if not (run_dir / CONFIG).exists():
        raise BadInput(f"{run_dir} holds no run: it has no {CONFIG}")
    return experiment_of_run(run_dir)


def read_run(run_dir: Path) -> dict[str, Any]:
    """What is known of the run besides its configuration; empty if nothing."""
    path = run_dir / RUN
    return _read(path) if path.exists() else {}


def write_records(
    run_dir: Path, experiment: Experiment, *, recipe: str, fingerprint: dict[str, Any]
) -> None:
    """Each file appears whole or not at all."""
    run_dir.mkdir(parents=True, exist_ok=True)
    run = read_run(run_dir) | {
        "recipe": recipe,
        "fingerprint": fingerprint,
        "versions": versions(),
        "devices": [f"{d.platform}:{d.device_kind}" for d in jax.devices()[:1]],
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        "mesh": dataclasses.asdict(experiment.mesh),
    }
    for name, value in ((CONFIG, to_dict(experiment)), (RUN, run)):
        write_whole(run_dir / name, json.dumps(value, indent=2) + "\n")


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in _VERSIONS:
        found[name] = importlib.metadata.version(name)
    return found


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
