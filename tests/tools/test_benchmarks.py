"""The benchmarks run on a recipe of seconds and write what they found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from xla_flags import with_devices


ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "tests" / "helpers" / "tiny_recipe.py"

pytestmark = pytest.mark.full


def bench(name: str, out: Path, *arguments: str) -> dict:
    """The report of a benchmark."""
    script = ROOT / "tools" / "benchmarks" / f"{name}.py"
    ended = subprocess.run(
        [sys.executable, str(script), str(RECIPE), *arguments, "--out", str(out)],
        env=os.environ | {"XLA_FLAGS": with_devices(1)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    report = json.loads(out.read_text())
    assert {"benchmark", "date", "command", "versions", "machine", "results"} <= set(report)
    return report["results"]


def test_train(tmp_path: Path) -> None:
    found = bench("train", tmp_path / "a.json", "--steps", "3", "--set", "train.batch_size=2")
    assert len(found["seconds_per_step"]) == 3
    step = sorted(found["seconds_per_step"])[1]
    assert found["tokens_per_second"] == pytest.approx(2 * 24 / step)
    assert 0 < found["mfu"] < 1


def test_memory(tmp_path: Path) -> None:
    short = "train.log_every_steps=5"
    found = bench("memory", tmp_path / "b.json", "--steps", "20", "--settle", "10", "--set", short)
    assert list(found["resident_bytes"]) == ["5", "10", "15", "20"]
    assert found["first_bytes"] == found["resident_bytes"]["10"]
    assert found["last_bytes"] > 1e8


def test_startup(tmp_path: Path) -> None:
    found = bench("startup", tmp_path / "c.json", "--rounds", "1")
    assert len(found["cold_seconds"]) == 1 and len(found["warm_seconds"]) == 2
    assert 0.2 < found["warm_median"] < 120 and found["help_seconds"] > 0


def test_scan(tmp_path: Path) -> None:
    """Without a rival: chunks and single tokens agree, and each is timed."""
    script, out = ROOT / "tools" / "benchmarks" / "scan.py", tmp_path / "s.json"
    small = ["--tokens", "128", "--heads", "2", "--key-heads", "1", "--head-dim", "8"]
    command = [sys.executable, str(script), *small, "--lengths", "256", "--rounds", "1"]
    ended = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(out.read_text())["results"]
    ways = [
        f"{name} {way}" for name in ("gated delta", "mamba2") for way in ("forward", "backward")
    ]
    assert list(found["cases"]) == ways
    assert all(c["token by token over chunked"] > 0 for c in found["cases"].values())
    assert sorted(found["seconds_a_token"]) == ["256", "single token"]


def test_kernels(tmp_path: Path) -> None:
    """Small shapes: every family runs, agrees with its oracle, and says what was left out."""
    script, out = ROOT / "tools" / "benchmarks" / "kernels.py", tmp_path / "d.json"
    command = [sys.executable, str(script), "--quick", "--rounds", "2", "--out", str(out)]
    ended = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": with_devices(1)}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(out.read_text())["results"]
    assert found["wrong"] == [] and set(found["ceilings"]) == {"float32", "bfloat16", "copy"}
    families = {name.split()[0] for name in found["cases"]}
    assert families == {"attention", "decode", "lookup"} and len(found["cases"]) == 15
    for name, case in found["cases"].items():
        ours = [c for c in case["candidates"] if c.startswith("memtrain")]
        rivals = set(case["candidates"]) - set(ours)
        assert ours and rivals, name
        assert all(c["error"] < 1e-4 for c in case["candidates"].values()), name
