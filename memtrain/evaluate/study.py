"""A study: several models on one task, each at its own best learning rate, over several seeds.

What is compared must have had the same care. So every arm brings its candidates (learning rates,
as a rule), all are trained with the first seed, and the one that ends best is trained with the
others too. The same data, steps and seeds for all arms are the caller's to give.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from memtrain.config import Experiment, override
from memtrain.memory.protocol import spec_bytes
from memtrain.model.flops import forward_flops
from memtrain.model.parameters import Skeleton
from memtrain.train.metrics import FILE_NAME as METRICS
from memtrain.train.metrics import read_lines
from memtrain.train.run import train
from memtrain.train.state import CARRY_CAPACITY


Say = Callable[[str], None]


@dataclass(frozen=True)
class Score:
    """What a run is judged by: a metric of held-out data, and which end of it is the good one."""

    metric: str
    best: Literal["most", "least"]

    def worth(self, value: float) -> float:
        """The more the better; a value that is not a number is worth less than any."""
        return _finite(value if self.best == "most" else -value)


ACCURACY = Score("validation/accuracy", best="most")
BITS_PER_BYTE = Score("validation/bits_per_byte", best="least")
LOSS = Score("validation/loss", best="least")


@dataclass(frozen=True)
class Curve:
    """What was measured on held-out data on the way of one run, and at its end."""

    steps: list[int]
    scores: list[float]

    @property
    def last(self) -> float:
        return self.scores[-1]

    def as_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "scores": self.scores}


@dataclass(frozen=True)
class Arm:
    """One model of a study: all candidates with the first seed, the chosen one with every seed."""

    name: str
    chosen: str
    candidates: dict[str, float]
    """What each candidate ended with."""
    curves: dict[int, Curve]
    """Of the chosen one, by seed."""
    runs: dict[int, Path]
    """Their run directories."""

    @property
    def spread(self) -> tuple[float, float]:
        """Mean and standard deviation of what the seeds ended with."""
        return mean_and_spread([curve.last for curve in self.curves.values()])

    def as_dict(self) -> dict[str, Any]:
        return {
            "chosen": self.chosen,
            "candidates": self.candidates,
            "mean": self.spread[0],
            "stdev": self.spread[1],
            "seeds": {str(seed): curve.as_dict() for seed, curve in self.curves.items()},
        }


Candidate = Experiment | Callable[[int], Experiment]
"""An experiment, or that of a seed."""


def at_rates(
    experiment: Experiment, rates: Sequence[float], settings: Sequence[str] = ()
) -> dict[str, Experiment]:
    """The candidates of most arms: the experiment under each learning rate, named by it."""
    return {
        f"{rate:g}": override(experiment, [*settings, f"optimizer.learning_rate={rate}"])
        for rate in rates
    }


def run_arm(
    name: str,
    candidates: Mapping[str, Candidate],
    seeds: Sequence[int],
    folder: Path,
    *,
    score: Score = ACCURACY,
    judge: Callable[[Path], float] | None = None,
    say: Say = print,
) -> Arm:
    """Trains an arm. Runs live in `folder/NAME/CANDIDATE/seed-N`; those that are done are read.

    judge: what a candidate is chosen by, made of its first run, the most being best; its last score
    unless given. Of equal candidates the first is chosen.
    """
    first, *others = seeds
    found: dict[str, Curve] = {}
    place = lambda label, seed: (folder / name / label / f"seed-{seed}").absolute()  # noqa: E731
    for label, experiment in candidates.items():
        found[label] = _run(experiment, first, place(label, first), score, say)
        say(f"{name}, {label}: {score.metric} {found[label].last:.4f}")
    worth = {label: score.worth(curve.last) for label, curve in found.items()}
    if judge is not None:
        worth = {label: _finite(judge(place(label, first))) for label in found}
    chosen = max(found, key=lambda label: worth[label])
    curves = {first: found[chosen]}
    for seed in others:
        curves[seed] = _run(candidates[chosen], seed, place(chosen, seed), score, say)
        say(f"{name}, {chosen}, seed {seed}: {score.metric} {curves[seed].last:.4f}")
    return Arm(
        name,
        chosen,
        {label: curve.last for label, curve in found.items()},
        curves,
        {seed: place(chosen, seed) for seed in seeds},
    )


def measured(run: Path, name: str, measure: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """What `measure` finds of a run, kept there as NAME.json and not measured again at its step."""
    kept = run / f"{name}.json"
    step = max(line["step"] for line in read_lines(run / METRICS))
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if found.get("at_step", step) != step or not found:
        found = {"at_step": step, **measure(run)}
        write_json(kept, found)
    return {key: value for key, value in found.items() if key != "at_step"}


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of a sample; the latter is 0 of one."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def spreads(
    values: Sequence[Mapping[str, float]], keys: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of what every seed measured, by what it is."""
    return {key: mean_and_spread([value[key] for value in values]) for key in keys}


def _finite(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def _run(candidate: Candidate, seed: int, folder: Path, score: Score, say: Say) -> Curve:
    experiment = candidate if isinstance(candidate, Experiment) else candidate(seed)
    seeded = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, seed=seed))
    curve = _curve(folder, score.metric)
    if curve is None or curve.steps[-1] < experiment.train.num_steps:
        train(seeded, folder, progress=lambda line: say(f"  {line}"))
        curve = _curve(folder, score.metric)
        assert curve is not None
    return curve


def _curve(folder: Path, metric: str) -> Curve | None:
    if not (folder / METRICS).exists():
        return None
    lines = [line for line in read_lines(folder / METRICS) if line.get(metric) is not None]
    steps, scores = [line["step"] for line in lines], [float(line[metric]) for line in lines]
    return Curve(steps, scores) if lines else None


def size_of(experiment: Experiment, vocab_size: int) -> dict[str, float]:
    """Parameters, FLOPs of a token's forward pass, and bytes of what one sequence keeps: of a row,
    or of a document without end where memories are carried."""
    skeleton = Skeleton.of(experiment.model, vocab_size)
    with jax.ensure_compile_time_eval():
        model = skeleton.merge(skeleton.shapes)  # type: ignore[arg-type]
    seq_len = experiment.train.seq_len
    capacity = seq_len if experiment.train.carry == "none" else CARRY_CAPACITY
    return {
        "parameters": sum(leaf.size for leaf in skeleton.shapes.values()),
        "forward_flops_per_token": forward_flops(model, seq_len).total,
        "state_bytes": spec_bytes(model.state_spec(1, capacity)),
    }


def write_json(path: Path, found: Mapping[str, Any]) -> None:
    """Figures as JSON, and the folder that they lie in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
