"""Kill it anywhere, start it again: the parameters are those of a run that was never stopped."""

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from xla_flags import with_devices

from memtrain.config import override
from memtrain.data.batch import Batch
from memtrain.decode.export import export
from memtrain.errors import BadInput, CheckpointError, Preempted
from memtrain.model.parameters import parameters_of
from memtrain.parallel.mesh import mesh_of
from memtrain.recipe import load_recipe
from memtrain.train.checkpoint import CheckpointStore
from memtrain.train.load import load_model
from memtrain.train.metrics import read_lines
from memtrain.train.run import train
from memtrain.train.state import Plan
from memtrain.train.step import make_evaluation_step


RECIPE = Path(__file__).parents[1] / "helpers" / "tiny_recipe.py"


def experiment(*changes: str, function: str = "recipe"):
    return override(load_recipe(f"{RECIPE}:{function}"), list(changes))


def final_leaves(run: Path, config) -> list[np.ndarray]:
    """Every leaf of the last checkpoint: parameters, optimizer, carry, counters, rng."""
    store = CheckpointStore(run / "checkpoints")
    candidate = store.newest_valid()
    assert candidate is not None
    plan = Plan.of(config, candidate.metadata["vocab_size"], mesh_of(config.mesh))
    return [np.asarray(a) for a in jax.tree.leaves(store.restore(candidate.step, plan.abstract()))]


def assert_same(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    assert len(a) == len(b) > 20
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run = tmp_path_factory.mktemp("unbroken") / "run"
    config = experiment()
    train(config, run, progress=quiet)
    return run, final_leaves(run, config)


def test_more_steps_later_are_the_same_steps(unbroken, tmp_path):
    """The schedule's horizon is the stored one unless it is set."""
    _run, leaves = unbroken
    short = experiment("train.num_steps=25", "optimizer.horizon_steps=60")
    train(short, tmp_path, progress=quiet)
    said: list[str] = []
    train(experiment(), tmp_path, progress=said.append)
    assert "train.num_steps: 25 -> 60" in said
    assert_same(final_leaves(tmp_path, short), leaves)
    steps = [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")]
    assert steps == sorted(steps) and len(set(steps)) == 12


@pytest.mark.full
@pytest.mark.parametrize(
    "changes", [[], ["train.carry=tbptt", "train.tbptt_segments=3"]], ids=["stop", "tbptt"]
)
def test_carried_memory_is_part_of_the_checkpoint(tmp_path, changes):
    config = experiment(*changes, function="carried")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(override(config, ["train.num_steps=20"]), whole, progress=quiet)
    first = override(config, ["train.num_steps=10", "optimizer.horizon_steps=20"])
    train(first, parts, progress=quiet)
    train(override(config, ["train.num_steps=20"]), parts, progress=quiet)
    a, b = final_leaves(whole, config), final_leaves(parts, config)
    assert_same(a, b)
    plan = Plan.of(config, 256, mesh_of(config.mesh))
    carry = jax.tree.leaves(plan.shapes().carry)
    assert len(carry) > 8
    assert_held_out_is_carried(whole, config)


def assert_held_out_is_carried(run: Path, config) -> None:
    """Nothing is held out here; the step itself: two parts with their state are the whole."""
    plan = Plan.of(config, 256, mesh_of(config.mesh))
    parameters = load_model(run).model
    step, values = make_evaluation_step(plan), parameters_of(parameters)
    rng = np.random.default_rng(0)
    rows, half = config.train.batch_size, 12
    tokens = rng.integers(0, 256, (rows, 2 * half + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(2 * half, dtype=np.int32), (rows, 2 * half))
    ones = np.ones((rows, 2 * half), np.float32)
    whole = Batch(tokens[:, :-1], tokens[:, 1:], ones, positions, positions == 0, ones > 0)
    cut = lambda a, b: Batch(*(leaf[:, a:b] for leaf in whole))  # noqa: E731
    carry = plan.empty_carry(values)
    expected, _ = step(values, whole, carry)
    first, carry = step(values, cut(0, half), carry)
    second, _ = step(values, cut(half, 2 * half), carry)
    fresh, _ = step(values, cut(half, 2 * half), plan.empty_carry(values))
    total = float(first["nll"]) + float(second["nll"])
    np.testing.assert_allclose(total, float(expected["nll"]), rtol=1e-5)
    assert abs(float(fresh["nll"]) - float(second["nll"])) > 1e-3


@pytest.mark.full
def test_sigkill_anywhere(unbroken, tmp_path):
    _, leaves = unbroken
    rng = random.Random(0)
    killed = 0
    for _ in range(12):
        # The first life reaches a checkpoint at least, later ones may die before they do anything.
        code = _run_and_kill(tmp_path, after_step=5 * rng.randrange(1, 4), delay=rng.random() * 0.2)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed += 1
    else:
        pytest.fail("it never finished")
    assert killed >= 2
    assert_same(final_leaves(tmp_path, experiment()), leaves)


def _run_and_kill(run: Path, *, after_step: int, delay: float) -> int:
    """Kills `delay` seconds after `after_step` more steps were printed; the exit code."""
    child = subprocess.Popen(
        [sys.executable, "-u", "-m", "memtrain", "train", str(RECIPE), "--run-dir", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"XLA_FLAGS": with_devices(1)},
        text=True,
    )
    with child:
        assert child.stdout is not None
        begun: int | None = None
        last = 0
        for line in child.stdout:
            found = re.match(r"step +(\d+)/", line)
            last = int(found[1]) if found else last
            if found and begun is None:
                begun = int(found[1])
            if found and begun is not None and int(found[1]) - begun >= after_step:
                time.sleep(delay)
                child.kill()
                break
        code = child.wait()
    assert max(CheckpointStore(run / "checkpoints").steps(), default=0) >= last - 5
    return code


def test_sigterm_saves_and_asks_to_be_run_again(tmp_path):
    said: list[str] = []

    def stop_at_20(line: str) -> None:
        said.append(line)
        if line.startswith("step     20/"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match="SIGTERM and saved at step 2"):
        train(experiment(), tmp_path, progress=stop_at_20)
    assert Preempted.exit_code == 75
    saved = max(CheckpointStore(tmp_path / "checkpoints").steps())
    assert 20 <= saved <= 26


def test_another_identity_is_refused_by_name(unbroken):
    run, leaves = unbroken
    config = experiment()
    with pytest.raises(BadInput, match=r"train.seed was 0 and is 7"):
        train(override(config, ["train.seed=7"]), run, progress=quiet)
    with pytest.raises(BadInput, match=r"model.dim"):
        train(override(config, ["model.dim=32"]), run, progress=quiet)
    assert_same(final_leaves(run, config), leaves)


def test_changed_text_is_refused(tmp_path):
    text = tmp_path / "text.py"
    text.write_bytes(RECIPE.read_bytes())
    config = experiment(f"data.path={text}", "train.num_steps=5")
    train(config, tmp_path / "run", progress=quiet)
    text.write_bytes(RECIPE.read_bytes() + b"# changed\n")
    more = override(config, ["train.num_steps=10"])
    with pytest.raises(BadInput, match="reading other data"):
        train(more, tmp_path / "run", progress=quiet)


def test_damaged_checkpoints_never_start_afresh(tmp_path):
    config = experiment("train.num_steps=5")
    train(config, tmp_path, progress=quiet)
    for manifest in tmp_path.glob("checkpoints/*/MANIFEST.json"):
        manifest.write_text("{}")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="none is valid"):
        train(config, tmp_path, progress=quiet)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_bad_input_writes_nothing(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    for change, message in (
        (f"data.path={empty}", "empty"),
        ("data.path=/nowhere/at/all", "nowhere"),
        ("mesh.data=4 mesh.fsdp=4 train.batch_size=16", "16 devices"),
        ("train.tensorboard=maybe", "train.tensorboard"),
        ("model.vocab_size=100", "model.vocab_size=100"),
        ("model.dim=0", "model.dim=0: it takes 1 or more"),
        ("model.dim=15", "num_heads"),
        ("model.pattern.0.num_heads=16", "head_dim=1 must be even"),
        ("model.pattern.0.num_heads=0", "num_heads=0: it takes 1 or more"),
        ("model.pattern.0.soft_cap=-1", "soft_cap=-1.0: it takes more than 0"),
        ("model.pattern.0.backend=foo", "backend='foo': there are reference, xla"),
        ("train.evaluate_every_steps=0", "train.evaluate_every_steps=0: it takes 1 or more"),
        ("train.num_steps=-3", "train.num_steps=-3: it takes 1 or more"),
        ("train.keep_checkpoints=0", "train.keep_checkpoints=0: it takes 1 or more"),
        ("train.profile_steps=60,70", "train.profile_steps=60,70: it takes the first"),
        ("train.init_from=/nowhere", "no such run or artifact"),
    ):
        with pytest.raises(BadInput, match=message) as caught:
            train(experiment(*change.split()), tmp_path / "run", progress=quiet)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_several_seeds_of_one_recipe(tmp_path):
    config = experiment("train.num_steps=6")
    result = train(config, tmp_path, seeds=[3, 4], progress=quiet)
    losses = [r["train/loss"] for r in result["runs"]]
    assert losses[0] != losses[1]
    assert result["train/loss"]["mean"] == pytest.approx(np.mean(losses))
    assert result["train/loss"]["stdev"] == pytest.approx(np.std(losses, ddof=1))
    stored = json.loads((tmp_path / "seed-4" / "config.json").read_text())
    assert stored["train"]["seed"] == 4
    table = json.loads((tmp_path / "seeds.json").read_text())
    assert table["seeds"] == [3, 4] and table["train/loss"] == result["train/loss"]

    # One more seed later: those that are done report the same again.
    more = train(config, tmp_path, seeds=[3, 4, 5], progress=quiet)
    assert [r["train/loss"] for r in more["runs"]][:2] == losses
    assert set(more) == set(result)


@pytest.mark.full
def test_init_from_a_run_takes_what_fits(unbroken, tmp_path):
    run, _ = unbroken
    config = experiment(f"train.init_from={run}")
    wider = dataclasses.replace(
        config, model=dataclasses.replace(config.model, tied_embeddings=False)
    )
    said: list[str] = []
    train(override(wider, ["train.num_steps=1"]), tmp_path, progress=said.append)
    text = "\n".join(said)
    assert f"parameters from {run}" in text
    assert "fresh: unembedding.weight" in text and "unused" not in text

    # And back: what the source has and the model does not is told, too.
    said.clear()
    narrow = override(config, ["train.num_steps=1", f"train.init_from={tmp_path}"])
    train(narrow, tmp_path / "narrow", progress=said.append)
    assert "unused: unembedding.weight" in "\n".join(said)


@pytest.mark.full
def test_init_from_an_artifact_and_from_nothing(unbroken, tmp_path):
    run, _ = unbroken
    export(run, tmp_path / "model.mtx", programs=False)
    mesh = ["mesh.fsdp=2", "train.num_steps=1", "optimizer.learning_rate=0"]
    mesh += ["optimizer.table_learning_rate=0", f"train.init_from={tmp_path / 'model.mtx'}"]
    train(experiment(*mesh), tmp_path / "again", progress=quiet)
    after = load_model(tmp_path / "again").model
    for name, array in parameters_of(load_model(run).model).items():
        np.testing.assert_array_equal(parameters_of(after)[name], array, err_msg=name)
    for source, message in (("/nowhere", "no such run or artifact"), (tmp_path, "holds no run")):
        with pytest.raises(BadInput, match=message):
            train(experiment(f"train.init_from={source}"), tmp_path / "x", progress=quiet)
        assert not (tmp_path / "x").exists(), "a corrected command must not find another run"


@pytest.mark.full
@pytest.mark.parametrize("lag", [0, 4])
def test_no_step_is_told_before_the_save_that_it_must_not_outrun(tmp_path, monkeypatch, lag):
    """With saves made slow, the newest step on disk is never further behind than was asked for."""
    complete = CheckpointStore._complete

    def slow(self, draft, key):
        time.sleep(0.5)
        complete(self, draft, key)

    monkeypatch.setattr(CheckpointStore, "_complete", slow)
    behind = []

    def look(line: str) -> None:
        if found := re.match(r"step +(\d+)/\d+ \| loss", line):
            saved = max(CheckpointStore(tmp_path / "checkpoints").steps(), default=0)
            behind.append(int(found[1]) - saved)

    changes = ("train.num_steps=20", "train.log_every_steps=1", f"train.checkpoint_lag_steps={lag}")
    train(experiment(*changes), tmp_path, progress=look)
    assert len(behind) == 20
    assert max(behind) <= 5 + lag
    assert max(behind) >= 5
    if lag:
        assert max(behind) > 5, "nothing was done meanwhile"


def test_a_finished_run_says_how_to_go_on(unbroken):
    run, _ = unbroken
    said: list[str] = []
    train(experiment(), run, progress=said.append)
    assert any("raise train.num_steps=60" in line for line in said)
