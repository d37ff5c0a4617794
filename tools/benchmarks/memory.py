"""Host memory of a run: is it flat? Resident bytes over the steps of a short-rowed recipe.

The recipe trains as a user's would, with its checkpoints and evaluations, in a process of its own;
what it needs at once is not the question, so rows are short unless --set says otherwise.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from common import write


@dataclass(frozen=True)
class Options:
    recipe: tyro.conf.Positional[str] = "experiments/quickstart.py"
    steps: int = 500
    settle: int = 150
    """Steps that are left out: pools fill until two checkpoints and evaluations have been."""
    set: tuple[str, ...] = (
        "train.batch_size=4",
        "train.seq_len=256",
        "train.checkpoint_every_steps=50",
        "train.evaluate_every_steps=50",
        "train.log_every_steps=10",
    )
    out: Path | None = None


def main() -> None:
    options = tyro.cli(Options)
    from memtrain.train.records import versions

    with tempfile.TemporaryDirectory(prefix="memtrain-memory-") as folder:
        command = [sys.executable, "-m", "memtrain", "train", options.recipe, "--run-dir", folder]
        command += ["--set", f"train.num_steps={options.steps}", *options.set]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    found = [(r["step"], r["host_resident_bytes"]) for r in rows if "host_resident_bytes" in r]
    steps, resident = np.array([pair for pair in found if pair[0] >= options.settle], float).T
    slope = float(np.polyfit(steps, resident, 1)[0])
    results = {
        "recipe": options.recipe,
        "set": list(options.set),
        "resident_bytes": dict(found),
        "bytes_per_step": slope,
        "first_bytes": resident[0],
        "last_bytes": resident[-1],
        "growth": resident[-1] / resident[0] - 1,
    }
    print(
        f"step {steps[0]:.0f}: {resident[0] / 2**20:,.0f} MiB, step {steps[-1]:.0f}: "
        f"{resident[-1] / 2**20:,.0f} MiB ({100 * results['growth']:+.1f}%); "
        f"{slope / 1024:+.1f} KiB a step"
    )
    write(options.out, "memory", results, versions())


if __name__ == "__main__":
    main()
