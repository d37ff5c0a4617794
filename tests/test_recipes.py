"""Every recipe of experiments/ loads and keeps its word, and the quickstart runs to its end."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from xla_flags import with_devices

from memtrain.config import Experiment
from memtrain.layers import Block, ProductKeyMemory, SwiGLU
from memtrain.model.ablation import memory_names
from memtrain.model.parameters import Skeleton
from memtrain.model.unstacked import abstract_model
from memtrain.recipe import load_recipe


ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
BYTES = 256


def recipes() -> list[str]:
    """file:function of every public function of a file that can be called without arguments."""
    found = []
    for path in sorted(EXPERIMENTS.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            arguments = node.args
            needed = len(arguments.posonlyargs) + len(arguments.args) - len(arguments.defaults)
            if needed + arguments.kw_defaults.count(None) == 0:
                found.append(f"{path.name}:{node.name}")
    return found


def load(name: str) -> Experiment:
    return load_recipe(f"{EXPERIMENTS}/{name}")


def num_parameters(name: str) -> int:
    return sum(s.size for s in Skeleton.of(load(name).model, BYTES).shapes.values())


def test_recipes_are_found():
    known = {"quickstart.py:recipe", "golden.py:recipe", "books.py:carried"}
    assert known <= set(recipes())
    files = {name.partition(":")[0] for name in recipes()}
    assert files == {path.name for path in EXPERIMENTS.glob("*.py")}


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_loads_and_describes_its_model(name: str):
    """Wherever its data is, and without the memory that its model would take."""
    experiment = load(name)
    assert isinstance(experiment, Experiment)
    assert experiment.train.batch_size % (experiment.mesh.data * experiment.mesh.fsdp) == 0
    leaves = jax.tree.leaves(abstract_model(experiment.model, experiment.model.vocab_size or BYTES))
    assert leaves and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    vocabulary = experiment.model.vocab_size or BYTES
    assert (vocabulary, experiment.model.dim) in {leaf.shape for leaf in leaves}
    assert memory_names(experiment.model)


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.py")), ids=lambda path: path.name)
def test_a_file_alone_means_its_function_recipe(path: Path):
    assert load_recipe(str(path)) == load(f"{path.name}:recipe")


def test_memories_of_the_quickstart():
    assert memory_names(load("quickstart.py:recipe").model) == {
        "short_conv": [(0, "mixer"), (2, "mixer"), (4, "mixer")],
        "window": [(1, "mixer"), (5, "mixer")],
        "product_key": [(1, "ffn")],
        "attention": [(3, "mixer")],
    }


def test_the_size_that_books_claims():
    claimed = re.search(r"(\d+)M-parameter", EXPERIMENTS.joinpath("books.py").read_text())
    assert claimed is not None
    found = num_parameters("books.py:recipe") / 1e6
    assert found == pytest.approx(float(claimed[1]), rel=0.05)


def test_with_and_without_memory_are_a_fair_comparison():
    """About as many parameters in `same_parameters`, as much arithmetic in `without_memory`."""
    with_memory = num_parameters("with_and_without.py:with_memory")
    same = num_parameters("with_and_without.py:same_parameters")
    assert same == pytest.approx(with_memory, rel=0.01)
    # Multiply-adds of a token in the layer that differs, by hand: query, gate and output, 2 heads
    # of width 128 against 2 x 128 half-keys, 8 rows of 192 for each; three matrices of 192 x 272.
    table = ProductKeyMemory(num_slots=128**2, num_heads=2, top_k=8, key_dim=128, value_dim=192)
    assert ffn_of("with_and_without.py:with_memory") == table
    assert ffn_of("with_and_without.py:without_memory") == SwiGLU(hidden=272)
    memory = 192 * (2 * 128 + 192 + 192) + 2 * (2 * 128 * 64) + 2 * 8 * 192
    assert pytest.approx(memory, rel=0.02) == 3 * 192 * 272


def ffn_of(name: str):
    """The feed-forward place of the second block: the one in which the recipes differ."""
    block = load(name).model.pattern[1]
    assert isinstance(block, Block)
    return block.ffn


RECIPE = """
from memtrain.config import Experiment
from memtrain.data.config import DataConfig
from memtrain.layers import Attention, Block, ModelConfig, ProductKeyMemory
from memtrain.train.config import OptimizerConfig, TrainConfig


def recipe() -> Experiment:
    table = ProductKeyMemory(num_slots=64, num_heads=2, top_k=3, key_dim=8, value_dim=16)
    return Experiment(
        name="tiny",
        model=ModelConfig(dim=16, pattern=(Block(mixer=Attention(num_heads=2), ffn=table),)),
        data=DataConfig(path=({folder!r},), validation_fraction=0.3),
        train=TrainConfig(
            num_steps=60,
            batch_size=16,  # slow enough that the signal arrives before the last step
            seq_len=64,
            log_every_steps=3,
            checkpoint_every_steps=60,
            evaluate_every_steps=60,
            evaluate_batches=1,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
    )
"""
MODULES = ("argparse", "ast", "bisect", "calendar", "cmd", "copy", "csv", "heapq")


def write_recipe(folder: Path) -> Path:
    """A recipe of seconds, on the first 3,000 bytes of some modules of this Python."""
    text = folder / "text"
    text.mkdir()
    for name in MODULES:
        source = inspect.getsource(__import__(name)).encode()[:3000]
        (text / f"{name}.py").write_bytes(source[: source.rindex(b"\n") + 1])
    path = folder / "tiny.py"
    path.write_text(RECIPE.format(folder=str(text)), encoding="utf-8")
    return path


def quickstart(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "memtrain.quickstart", *arguments],
        cwd=cache.parent,
        env=os.environ | {"XLA_FLAGS": with_devices(1), "MEMTRAIN_CACHE": str(cache)},
        capture_output=True,
        text=True,
        errors="replace",  # what an untrained model says of bytes is not always text
        timeout=300,
        check=False,
    )


@pytest.mark.full
def test_the_quickstart_stops_resumes_and_reports(tmp_path):
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    arguments = ("--recipe", str(recipe), "--run-dir", str(run), "--prompt", "def f(")
    done = quickstart(*arguments, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()

    # The commands are shown as a user would type them: training twice, for it is stopped.
    commands = [line.split()[2] for line in lines if line.startswith("$ memtrain ")]
    assert commands == ["train", "train", "export", "generate"]
    stopped = next(i for i, line in enumerate(lines) if line.startswith("-- stopped on the way"))
    resumed = re.fullmatch(rf"resumed from step (\d+) of {re.escape(str(run))}", lines[stopped + 2])
    assert resumed is not None, lines[stopped : stopped + 3]
    assert 24 <= int(resumed[1]) < 60
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in logged if "train/loss" in line]
    assert steps == list(range(3, 61, 3))

    assert lines[-1] == str((run / "report.html").resolve())
    assert "<html" in (run / "report.html").read_text(encoding="utf-8")
    assert json.loads((run / "model.mtx" / "manifest.json").read_text())
    # What was held out is told with each of the memories and without.
    told = next(line for line in lines if line.startswith("-- bits per byte:"))
    bits = dict(re.findall(r"(\w+) (\d+\.\d+)", told))
    assert set(bits) == {"all", "without_attention", "without_product_key"}
    assert all(0 < float(value) < 9 for value in bits.values())


@pytest.mark.full
def test_the_quickstart_ends_with_the_first_command_that_fails(tmp_path):
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    more = ("--run-dir", str(run))
    missing = quickstart("--recipe", "nowhere.py", *more, cache=tmp_path / "cache")
    assert missing.returncode == 2 and "there is no recipe nowhere.py" in missing.stderr
    wrong = quickstart(
        "--recipe", str(recipe), *more, "--set", "train.num_step=5", cache=tmp_path / "cache"
    )
    assert wrong.returncode == 2 and "train.num_steps" in wrong.stderr
    assert "memtrain export" not in wrong.stdout
    assert not run.exists()
