"""A training run of two processes: the losses of one, stopped at one step, resumed."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from xla_flags import with_devices

from memtrain.config import override
from memtrain.recipe import load_recipe
from memtrain.train.metrics import read_lines
from memtrain.train.run import train


pytestmark = pytest.mark.full
RECIPE = Path(__file__).parents[1] / "helpers" / "tiny_recipe.py"
STEPS = 24
CHANGES = [
    "mesh.fsdp=2",
    f"train.num_steps={STEPS}",
    "train.log_every_steps=1",
    "train.checkpoint_every_steps=100",
]


def command(run: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "memtrain", "train", str(RECIPE), "--run-dir", str(run), "--set"),
        *CHANGES,
    ]


def start_job(run: Path) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": with_devices(1)} | job
    return [
        subprocess.Popen(
            command(run),
            env=environment | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]


def ended(job: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    try:
        outputs = [process.communicate(timeout=120)[0] for process in job]
    finally:
        for process in job:
            process.kill()
    return [(process.returncode, output) for process, output in zip(job, outputs, strict=True)]


def losses(run: Path) -> dict[int, float]:
    lines = read_lines(run / "metrics.jsonl")
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def test_two_processes_train_stop_together_and_go_on(tmp_path):
    experiment = override(load_recipe(str(RECIPE)), CHANGES)
    train(experiment, tmp_path / "alone", progress=lambda line: None)
    run = tmp_path / "run"
    job = start_job(run)
    while not (run / "metrics.jsonl").exists() or max(losses(run), default=0) < 3:
        assert all(process.poll() is None for process in job), ended(job)
        time.sleep(0.05)
    job[1].send_signal(signal.SIGTERM)  # to one of the two, and not to the one that writes
    for code, output in ended(job):
        assert code == 75, output
        assert "saved at step" in output, output
    saved = [int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal()]
    assert len(saved) == 1 and 3 <= saved[0] < STEPS
    for code, output in ended(start_job(run)):
        assert code == 0, output
    found, expected = losses(run), losses(tmp_path / "alone")
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
