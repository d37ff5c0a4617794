"""The main job from end to end, as the commands that a user would type.

Trains half of the way, is asked to stop, resumes from its checkpoint with the same command,
exports, decodes from the cache, and writes the report. `tools/quickstart` runs this after its
set-up.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from memtrain.errors import PREEMPTED


RECIPE = Path(__file__).resolve().parents[1] / "experiments" / "quickstart.py"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code of the first command that fails, or 0."""
    parser = argparse.ArgumentParser(prog="tools/quickstart", description=__doc__)
    parser.add_argument("--recipe", default=_short(RECIPE), help="path/to/file.py[:function]")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--prompt", default="def read_config(path):\n")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="fields of the recipe to change"
    )
    options = parser.parse_args(arguments)
    if not Path(options.recipe.partition(":")[0]).exists():
        print(f"tools/quickstart: error: there is no recipe {options.recipe}", file=sys.stderr)
        return 2
    began = time.monotonic()
    run, artifact = options.run_dir, options.run_dir / "model.mtx"

    train = ["train", options.recipe, "--run-dir", str(run)]
    if options.set:
        train += ["--set", *options.set]
    code = _train_and_stop_half_way(train)
    if code == PREEMPTED:
        _say("stopped on the way, as a preempted job is; the same command goes on from there")
        code = _run(train)
    if code:
        return code
    for command in (
        ["export", str(run), "--out", str(artifact)],
        ["generate", str(artifact), "--prompt", options.prompt, "--max-tokens", "160"],
    ):
        if code := _run(command):
            return code
    report = subprocess.run(
        _command(["report", str(run), "--json"]), stdout=subprocess.PIPE, check=False
    )
    if report.returncode:
        return report.returncode
    found = json.loads(report.stdout)
    _headlines(found)
    seconds = round(time.monotonic() - began)
    _say(f"done in {seconds // 60}m{seconds % 60:02}s; everything is in {run}")
    print(Path(found["report"]).resolve(), flush=True)
    return 0


def _train_and_stop_half_way(train: list[str]) -> int:
    """Trains with SIGTERM at half of the steps. A run that is past that point is left alone."""
    _say(shlex.join(["memtrain", *train]))
    child = subprocess.Popen(_command(train), stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    asked = False
    for line in child.stdout:
        print(line, end="", flush=True)
        step = _step_of(line)
        if step is not None and not asked and 0.4 <= step <= 0.6:
            child.send_signal(signal.SIGTERM)
            asked = True
    return child.wait()


def _step_of(line: str) -> float | None:
    """Share of the steps done, from a line such as `step     25/700 | loss ...`."""
    head, _, _ = line.partition("|")
    done, slash, of = head.removeprefix("step").strip().partition("/")
    if not (line.startswith("step") and slash):
        return None
    return int(done) / int(of)


def _run(arguments: list[str]) -> int:
    _say(shlex.join(["memtrain", *arguments]))
    return subprocess.run(_command(arguments), check=False).returncode


def _command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "memtrain", *arguments]


def _headlines(found: dict) -> None:
    """What the report says, in a few lines of the terminal."""
    for name in ("bits_per_byte", "baselines"):
        if isinstance(found.get(name), dict):
            values = ", ".join(
                f"{k} {v:.3f}" for k, v in found[name].items() if isinstance(v, float)
            )
            _say(f"{name.replace('_', ' ')}: {values}")


def _say(line: str) -> None:
    print(f"$ {line}" if line.startswith("memtrain ") else f"-- {line}", flush=True)


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


if __name__ == "__main__":
    sys.exit(main())
