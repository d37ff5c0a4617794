"""The golden path, from end to end: `experiments/golden.py` on a mesh, killed, resumed on another,
exported, decoded from its cache, evaluated. The logits are held to `reference.py`."""

import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from xla_flags import with_devices

import memtrain_kernels
from memtrain.config import Experiment, override
from memtrain.decode.artifact import Artifact
from memtrain.decode.engine import Engine
from memtrain.decode.export import export
from memtrain.evaluate.run import evaluate
from memtrain.memory.protocol import Context
from memtrain.model.loss import cross_entropy_sum
from memtrain.model.parameters import parameters_of
from memtrain.recipe import load_recipe
from memtrain.train.load import load_model
from memtrain.train.metrics import read_lines
from memtrain.train.run import train


pytestmark = pytest.mark.full
ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "experiments" / "golden.py"


def _reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "reference", Path(__file__).with_name("reference.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> tuple[Experiment, Path, Path]:
    """The recipe, its finished run and its artifact."""
    folder = tmp_path_factory.mktemp("golden")
    run, artifact = folder / "run", folder / "model.mtx"
    _train_and_kill(run)
    said: list[str] = []
    changes = ["mesh.data=2", "mesh.fsdp=2", "mesh.context=2", "mesh.tensor=1"]
    resumed = override(load_recipe(str(RECIPE)), changes)
    before = memtrain_kernels.backend_counts().get("xla", 0)
    train(resumed, run, recipe=str(RECIPE), progress=said.append)
    assert any("resumed from step" in line for line in said), said
    assert memtrain_kernels.last_backend() == "xla"
    assert memtrain_kernels.backend_counts()["xla"] > before
    export(run, artifact, programs=False)
    return resumed, run, artifact


def _train_and_kill(run: Path) -> None:
    """SIGKILL as soon as the first checkpoint is whole."""
    child = subprocess.Popen(
        [sys.executable, "-m", "memtrain", "train", str(RECIPE), "--run-dir", str(run)],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": with_devices(8)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not (run / "checkpoints" / "8" / "MANIFEST.json").exists():
        assert child.poll() is None, f"training ended by itself with {child.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()


def test_it_learned_and_was_watched(golden):
    _, run, _ = golden
    lines = read_lines(run / "metrics.jsonl")
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert sorted(losses) == [4, 8, 12, 16, 20, 24]
    assert losses[24] < losses[4] - 0.5
    held_out = [line["validation/bits_per_byte"] for line in lines if "validation/loss" in line]
    assert len(held_out) == 2 and held_out[1] < held_out[0] < 9


def test_every_memory_learns(golden):
    """A gradient reaches every parameter of every memory, and the shared table."""
    _, run, _ = golden
    model = load_model(run).model
    tokens = np.frombuffer(RECIPE.read_bytes()[:192], np.uint8).reshape(2, 96).astype(np.int32)

    def loss(model):
        hidden, _, _ = model(tokens, None, Context.of_documents(2, 96))
        return cross_entropy_sum(
            hidden[:, :-1], model.head(), tokens[:, 1:], np.ones((2, 95), np.float32), 64
        )

    gradient = jax.jit(jax.grad(loss))(model)
    norms = {n: float(np.abs(g).max()) for n, g in parameters_of(gradient).items()}
    memories = {n: v for n, v in norms.items() if ".layer." in n or n.startswith("tables.")}
    assert "tables.memory" in memories and sum("taps" in n for n in memories) == 4
    assert min(memories.values()) > 1e-6, memories


def test_decoding_reproduces_the_float64_reference(golden):
    """Prefill in chunks and token by token, past twice the window, to 1e-4."""
    experiment, _, path = golden
    artifact = Artifact.load(path)
    tokens = np.frombuffer(RECIPE.read_bytes()[:60], np.uint8).astype(np.int32)
    weights = {}
    for file in sorted(path.glob("*.safetensors")):
        weights |= load_file(file)
    window, recurrent, bank, _ = experiment.model.pattern
    expected = _reference().logits(
        weights,
        tokens,
        depth=8,
        heads=4,
        kv_heads=2,
        window=window.window,
        sinks=window.sink_tokens,
        top_k=4,
        banked={"window": bank.window, "size": bank.bank_size, "top_k": bank.top_k},
        delta_heads=recurrent.mixer.num_heads,
    )
    assert len(tokens) > 3 * window.window
    engine = Engine(artifact, batch=1, capacity=64, chunk=16)
    got = {25: engine.prefill(tokens[None, :26])}
    for t in range(26, 60):
        got[t] = engine.step(tokens[t : t + 1])
    for t, logits in got.items():
        np.testing.assert_allclose(np.asarray(logits)[0], expected[t], atol=1e-4, rtol=0)


def test_evaluation_goes_through_the_decode_path(golden):
    _, run, path = golden
    of_artifact = evaluate(path, task="bpb", data=(str(RECIPE),), without=())
    of_run = evaluate(run, task="bpb", data=(str(RECIPE),), without=())
    assert of_artifact["bits_per_byte"] == pytest.approx(of_run["bits_per_byte"], abs=1e-6)
    without = evaluate(path, task="bpb", data=(str(RECIPE),), without=("attention",))
    assert abs(without["bits_per_byte"] - of_artifact["bits_per_byte"]) > 1e-3


def test_the_artifact_is_the_trained_model(golden):
    experiment, run, path = golden
    model, artifact = load_model(run).model, Artifact.load(path)
    tokens = np.arange(48, dtype=np.int32)[None] % 251
    # One program for both: what is compared are the parameters.
    forward = jax.jit(lambda model: model(tokens, None, Context.of_documents(1, 48))[0])
    hidden, again = forward(model), forward(artifact.stacked_model())
    np.testing.assert_array_equal(np.asarray(hidden), np.asarray(again))
    assert dataclasses.replace(artifact.experiment.mesh) == experiment.mesh
