"""Training runs of several processes: the losses of one, stopped at one step, resumed."""

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


def command(run: Path, changes: list[str]) -> list[str]:
    return [
        *(sys.executable, "-m", "memtrain", "train", str(RECIPE), "--run-dir", str(run), "--set"),
        *changes,
    ]


def start_job(
    run: Path, changes: list[str] = CHANGES, processes: int = 2, devices: int = 1
) -> list[subprocess.Popen[str]]:
    """`devices` in each of the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes)}
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": with_devices(devices)} | job
    return [
        subprocess.Popen(
            command(run, changes),
            env=environment | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(processes)
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


@pytest.fixture(scope="module")
def few_losses(tmp_path_factory) -> dict[int, float]:
    """Of a few steps of one process on one device."""
    run = tmp_path_factory.mktemp("alone") / "run"
    train(override(load_recipe(str(RECIPE)), FEW), run, progress=lambda line: None)
    return losses(run)


FEW = ["train.num_steps=6", "train.log_every_steps=1", "train.checkpoint_every_steps=6"]


@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [
        # A row over two processes; one over both devices of each; every device a process.
        (2, 2, ["mesh.context=4"]),
        (2, 2, ["mesh.fsdp=2", "mesh.context=2"]),
        (4, 1, ["mesh.context=2", "mesh.tensor=2", "mesh.context_strategy=all_gather"]),
        pytest.param(4, 1, ["mesh.data=2", "mesh.context=2"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_context_axis_over_processes(tmp_path, few_losses, processes, devices, mesh):
    """Same rows in every process that holds a part of them, one ring over all of them."""
    run = tmp_path / "run"
    for code, output in ended(start_job(run, [*FEW, *mesh], processes, devices)):
        assert code == 0, output
    np.testing.assert_allclose(list(losses(run).values()), list(few_losses.values()), rtol=1e-5)
