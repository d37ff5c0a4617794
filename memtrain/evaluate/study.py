"""A study: several models on one task, each at its own best learning rate, over several seeds.

What is compared must have had the same care. So every arm brings its candidates (learning rates,
as a rule), all are trained with the first seed, and the one that ends best is trained with the
others too. The same data, steps and seeds for all arms are the caller's to give.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from memtrain.config import Experiment
from memtrain.evaluate.plots import PALETTE, as_png, new_figure, styled
from memtrain.memory.protocol import spec_bytes
from memtrain.model.flops import forward_flops
from memtrain.model.parameters import Skeleton
from memtrain.train.metrics import FILE_NAME as METRICS
from memtrain.train.metrics import read_lines
from memtrain.train.records import versions
from memtrain.train.run import train
from memtrain.train.state import CARRY_CAPACITY


Say = Callable[[str], None]
SCORE = "validation/accuracy"


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
    def mean(self) -> float:
        return mean_and_spread([curve.last for curve in self.curves.values()])[0]

    @property
    def stdev(self) -> float:
        """Over the seeds."""
        return mean_and_spread([curve.last for curve in self.curves.values()])[1]

    def as_dict(self) -> dict[str, Any]:
        return {
            "chosen": self.chosen,
            "candidates": self.candidates,
            "mean": self.mean,
            "stdev": self.stdev,
            "seeds": {str(seed): curve.as_dict() for seed, curve in self.curves.items()},
        }


Candidate = Experiment | Callable[[int], Experiment]
"""An experiment, or that of a seed."""


def run_arm(
    name: str,
    candidates: Mapping[str, Candidate],
    seeds: Sequence[int],
    folder: Path,
    *,
    score: str = SCORE,
    best: Literal["most", "least"] = "most",
    judge: Callable[[Path], float] | None = None,
    say: Say = print,
) -> Arm:
    """Trains an arm. Runs live in `folder/NAME/CANDIDATE/seed-N`; those that are done are read.

    score: a metric of the held-out data. judge: what is made of a run and a candidate is chosen by,
    the most being best; its last score unless given. Of equal candidates the first is chosen.
    """
    first, *others = seeds
    found: dict[str, Curve] = {}
    place = lambda label, seed: (folder / name / label / f"seed-{seed}").absolute()  # noqa: E731
    for label, experiment in candidates.items():
        found[label] = _run(experiment, first, place(label, first), score, say)
        say(f"{name}, {label}: {score} {found[label].last:.4f}")
    sign = 1 if best == "most" else -1
    worth = {label: _finite(sign * curve.last) for label, curve in found.items()}
    if judge is not None:
        worth = {label: _finite(judge(place(label, first))) for label in found}
    chosen = max(found, key=lambda label: worth[label])
    curves = {first: found[chosen]}
    for seed in others:
        curves[seed] = _run(candidates[chosen], seed, place(chosen, seed), score, say)
        say(f"{name}, {chosen}, seed {seed}: {score} {curves[seed].last:.4f}")
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
        write_study(kept, found)
    return {key: value for key, value in found.items() if key != "at_step"}


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of a sample; the latter is 0 of one."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _finite(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def _run(candidate: Candidate, seed: int, folder: Path, score: str, say: Say) -> Curve:
    experiment = candidate if isinstance(candidate, Experiment) else candidate(seed)
    seeded = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, seed=seed))
    curve = _curve(folder, score)
    if curve is None or curve.steps[-1] < experiment.train.num_steps:
        train(seeded, folder, progress=lambda line: say(f"  {line}"))
        curve = _curve(folder, score)
        assert curve is not None
    return curve


def _curve(folder: Path, score: str) -> Curve | None:
    if not (folder / METRICS).exists():
        return None
    lines = [line for line in read_lines(folder / METRICS) if line.get(score) is not None]
    steps, scores = [line["step"] for line in lines], [float(line[score]) for line in lines]
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


def where_measured() -> dict[str, Any]:
    """Machine and versions: a figure without them means little."""
    processor = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    return {
        "device": jax.devices()[0].device_kind,
        "processor": processor,
        "cores": os.cpu_count(),
        "versions": versions(),
    }


def study_arguments(
    description: str, *, runs: str, seeds: Sequence[int], arms: Sequence[str]
) -> argparse.ArgumentParser:
    """The command line of a study: arms and seeds, where its runs live, and what it writes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--arms", nargs="+", default=list(arms), choices=list(arms))
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--runs", type=Path, default=Path(runs), help="done ones are not repeated")
    parser.add_argument("--out", type=Path, help="figures as JSON")
    parser.add_argument("--plot", type=Path, help="a picture, .png")
    return parser


def draw_study(
    path: Path,
    panels: Mapping[str, Sequence[tuple[Arm, float]]],
    *,
    x: str,
    y: str,
    log_x: bool = False,
) -> None:
    """Scores on the way as a .png, a panel for each title: the mean of the seeds, and each of them.

    panels: arms, each with what a step counts for along x. Arms of one name have one colour.
    """
    arms = list(dict.fromkeys(arm.name for rows in panels.values() for arm, _ in rows))

    @styled
    def draw() -> bytes:
        figure = new_figure(4.6 * len(panels), 3.6)
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for panel, (title, rows) in zip(axes, panels.items(), strict=True):
            for arm, unit in rows:
                colour = PALETTE[arms.index(arm.name)]
                curves = list(arm.curves.values())
                at = unit * np.array(curves[0].steps)
                scores = np.array([curve.scores for curve in curves])
                for one in scores:
                    panel.plot(at, one, color=colour, alpha=0.25, linewidth=1)
                panel.plot(at, scores.mean(0), color=colour, label=arm.name)
            panel.set_title(title)
            if log_x:
                panel.set_xscale("log")
            panel.set_xlabel(x)
            panel.set_ylim(0, 1.03)
        axes[0].set_ylabel(y)
        axes[0].legend(frameon=False, fontsize=9, loc="lower right")
        return as_png(figure)

    path.write_bytes(draw())


def write_study(path: Path, found: Mapping[str, Any]) -> None:
    """The figures behind a results page, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
