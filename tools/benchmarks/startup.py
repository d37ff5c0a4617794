"""Start-up: seconds from the command to its first step, with empty caches and with full ones.

Each start is the command that a user types, in a process of its own. Cold: neither compiled
programs nor the corpus are cached. Warm: the same command once more, for a new run.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from common import write


@dataclass(frozen=True)
class Options:
    recipe: tyro.conf.Positional[str] = "experiments/quickstart.py"
    rounds: int = 2
    """Cold starts; two warm ones follow each."""
    out: Path | None = None


def first_step(recipe: str, run_dir: Path, cache: Path) -> float:
    """Seconds until the command says that its first step is done; then it is stopped."""
    command = [sys.executable, "-m", "memtrain", "train", recipe, "--run-dir", str(run_dir)]
    environment = os.environ | {"MEMTRAIN_CACHE": str(cache)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as child:
        assert child.stdout is not None
        said = []
        for line in child.stdout:
            said.append(line)
            if line.startswith("first step after"):
                seconds = time.perf_counter() - began
                child.kill()
                return seconds
    raise SystemExit(f"the command ended before its first step:\n{''.join(said)}")


def main() -> None:
    options = tyro.cli(Options)
    from memtrain.train.records import versions

    folder = Path(tempfile.mkdtemp(prefix="memtrain-startup-"))
    cold, warm = [], []
    try:
        for round in range(options.rounds):
            cache = folder / f"cache-{round}"
            for turn in range(3):
                seconds = first_step(options.recipe, folder / f"run-{round}-{turn}", cache)
                (warm if turn else cold).append(seconds)
                print(f"{'warm' if turn else 'cold'}: first step after {seconds:.1f} s", flush=True)
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "memtrain", "--help"], check=True, capture_output=True
        )
        help_seconds = time.perf_counter() - began
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    results = {
        "recipe": options.recipe,
        "cold_seconds": cold,
        "warm_seconds": warm,
        "cold_median": statistics.median(cold),
        "warm_median": statistics.median(warm),
        "help_seconds": help_seconds,
    }
    print(
        f"cold {results['cold_median']:.1f} s (aim: 30), warm {results['warm_median']:.1f} s "
        f"(aim: 6), --help {help_seconds:.2f} s"
    )
    write(options.out, "startup", results, versions())


if __name__ == "__main__":
    main()
