"""A memory described in the recipe itself: trained, exported, and decoded by another process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from xla_flags import with_devices


pytestmark = pytest.mark.full
EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "decayed_average.py"
RECIPE = """

from memtrain.config import Experiment
from memtrain.data.config import DataConfig
from memtrain.layers import ModelConfig, Window
from memtrain.train.config import TrainConfig


def recipe() -> Experiment:
    return Experiment(
        name="own",
        model=ModelConfig(dim=16, pattern=(Window(4, num_heads=2), DecayedAverageConfig(8))),
        data=DataConfig(path=(__file__,), validation_fraction=0.0),
        train=TrainConfig(num_steps=2, batch_size=2, seq_len=16),
    )
"""


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "memtrain", *arguments],
        env=os.environ | {"XLA_FLAGS": with_devices(1)},
        capture_output=True,
        text=True,
    )


def test_an_artifact_is_told_where_its_layers_are_described(tmp_path: Path):
    file = tmp_path / "my_recipe.py"
    source = EXAMPLE.read_text()
    file.write_text(source + RECIPE)
    run, artifact = str(tmp_path / "run"), str(tmp_path / "own.mtx")
    for arguments in (["train", str(file), "--run-dir", run], ["export", run, "--out", artifact]):
        done = command(*arguments)
        assert done.returncode == 0, done.stderr
    assert "checked against the training path\n  float32, chunked: compared" in done.stdout

    ask = ["generate", artifact, "--prompt", "def ", "--max-tokens", "3"]
    lost = command(*ask)
    assert lost.returncode == 2
    assert "unknown type 'DecayedAverageConfig'" in lost.stderr and "--recipe" in lost.stderr
    found = command(*ask, "--recipe", str(file))
    assert found.returncode == 0, found.stderr
    measured = command(
        "evaluate", artifact, "--task", "bpb", "--data", str(EXAMPLE), "--recipe", str(file)
    )
    assert measured.returncode == 0, measured.stderr
    assert "bits_per_byte" in measured.stdout
