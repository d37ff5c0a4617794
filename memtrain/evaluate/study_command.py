"""The command of a study: which arms and seeds, where its runs live, and the page that it fills."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from memtrain.evaluate.plots import PALETTE, as_png, new_figure, styled
from memtrain.evaluate.study import Arm, Candidate, run_arm, write_json
from memtrain.train.records import versions


if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Study:
    """One results page, from the command line to its figures.

    page: its name in docs/results; runs live in runs/study-PAGE. options: more of the command line,
    as argparse takes them, found in `given`.
    """

    def __init__(
        self,
        page: str,
        *,
        arms: Sequence[str],
        seeds: Sequence[int],
        options: Mapping[str, Mapping[str, Any]] | None = None,
        arguments: Sequence[str] | None = None,
    ):
        parser = argparse.ArgumentParser(description=f"The study of docs/results/{page}.md.")
        parser.add_argument("--arms", nargs="+", default=list(arms), choices=list(arms))
        parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
        runs = Path(f"runs/study-{page}")
        parser.add_argument("--runs", type=Path, default=runs, help="done ones are not repeated")
        parser.add_argument("--out", type=Path, help="figures as JSON")
        parser.add_argument("--plot", type=Path, help="a picture, .png")
        for name, settings in (options or {}).items():
            parser.add_argument(name, **settings)
        self.given = parser.parse_args(arguments)
        self.arms: list[str] = self.given.arms
        self.runs: Path = self.given.runs

    def arm(
        self, name: str, candidates: Mapping[str, Candidate], *, folder: str = "", **how: Any
    ) -> Arm:
        """`run_arm` with this study's seeds, in a folder of its runs."""
        return run_arm(name, candidates, self.given.seeds, self.runs / folder, **how)

    def keep(
        self,
        found: Sequence[Mapping[str, Any]],
        draw: Callable[[Figure], None] | None = None,
        size: tuple[float, float] = (6.4, 3.8),
    ) -> None:
        """Writes the JSON and the picture that were asked for. size: of the picture, inches."""
        if self.given.out is not None:
            write_json(self.given.out, {"results": list(found), "where": where_measured()})
        if self.given.plot is not None and draw is not None:

            @styled
            def drawn() -> bytes:
                figure = new_figure(*size)
                draw(figure)
                return as_png(figure)

            self.given.plot.parent.mkdir(parents=True, exist_ok=True)
            self.given.plot.write_bytes(drawn())


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


def table_row(*cells: Any, digits: int = 3) -> str:
    """A row of a results page. Pairs are mean and spread, mappings what each candidate scored."""

    def shown(cell: Any) -> str:
        match cell:
            case (mean, spread):
                return f"{mean:.{digits}f} ± {spread:.{digits}f}"
            case {**scores}:
                return " / ".join(f"{score:.{digits}f}" for score in scores.values())
            case int():
                return f"{cell:,}"
            case _:
                return str(cell)

    return f"| {' | '.join(map(shown, cells))} |"


def draw_curves(
    figure: Figure,
    panels: Mapping[str, Sequence[tuple[Arm, float]]],
    *,
    x: str,
    y: str,
    log_x: bool = False,
) -> None:
    """Scores on the way, a panel for each title: the mean of the seeds, and each of them.

    panels: arms, each with what a step counts for along x. Arms of one name have one colour.
    """
    arms = list(dict.fromkeys(arm.name for rows in panels.values() for arm, _ in rows))
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


def positions_mean(
    by_position: Sequence[Sequence[Mapping[str, float]]], key: str
) -> tuple[np.ndarray, np.ndarray]:
    """(where each stretch ends [S], mean of the seeds there [S]) of what `evaluate` says by
    position, a sequence a seed."""
    ends = np.array([part["to"] for part in by_position[0]])
    return ends, np.mean([[part[key] for part in seed] for seed in by_position], axis=0)
