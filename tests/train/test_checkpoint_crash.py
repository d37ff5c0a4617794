"""Real processes, killed or starved of disk while they save: nothing that was saved is lost."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
import pytest

from memtrain.errors import BadInput
from memtrain.train.checkpoint import Candidate, CheckpointStore
from memtrain.train.run_dir import RunLock


CHILD = Path(__file__).with_name("checkpoint_child.py")
LEAF_SHAPE = (128, 256)


def expected(step: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(step)
    return {f"w{i}": generator.standard_normal(LEAF_SHAPE, np.float32) for i in range(6)}


class Forker:
    """The process that forks the processes to be killed."""

    def __init__(self, stderr: IO[str]):
        self.process = subprocess.Popen(
            [sys.executable, str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, do: str, run: Path, **order: Any) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, "run": str(run), **order}) + "\n")
        self.process.stdin.flush()
        return int(self.line())

    def exit_code(self) -> int:
        return int(self.line())


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stderr") / "stderr"


@pytest.fixture(scope="module")
def forker(errors: Path) -> Iterator[Forker]:
    with errors.open("w") as stderr:
        forker = Forker(stderr)
        yield forker
        assert forker.process.stdin is not None and forker.process.stdout is not None
        forker.process.stdin.close()
        assert forker.process.wait(30) == 0
        forker.process.stdout.close()


def journal(run: Path) -> list[tuple[str, int]]:
    path = run / "journal"
    words = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [(word, int(step)) for word, step in words]


def wait_for(run: Path, word: str, since: int = 0, times: int = 1, seconds: float = 60.0) -> int:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = [value for name, value in journal(run)[since:] if name == word]
        if len(found) >= times:
            return found[-1]
        time.sleep(0.005)
    raise AssertionError(f"no {word!r} within {seconds} s: {journal(run)[since:]}")


def newest_exact(run: Path) -> Candidate | None:
    """The newest valid step, after comparing every bit of it with what was saved."""
    lines: list[str] = []
    store = CheckpointStore(run / "checkpoints", report=lines.append)
    candidate = store.newest_valid()
    # A killed save leaves no half step under a plain number, which would be "skipped".
    assert not [line for line in lines if "skipped" in line], lines
    if candidate is not None:
        want = expected(candidate.step)
        shapes = {name: jax.ShapeDtypeStruct(w.shape, w.dtype) for name, w in want.items()}
        found = store.restore(candidate.step, shapes)
        assert candidate.metadata == {"step": candidate.step}
        for name, leaf in want.items():
            assert np.asarray(found[name]).tobytes() == leaf.tobytes()
    return candidate


@pytest.mark.full
def test_killed_at_any_moment_the_last_saved_step_is_there(forker, tmp_path):
    rng = random.Random(11)
    tmp_path.joinpath("journal").touch()
    for _ in range(10):
        since = len(journal(tmp_path))
        pid = forker.start("save", tmp_path)
        # Some kills come at the first save of a process, some after one or two.
        wait_for(tmp_path, "saving", since, times=rng.choice([1, 2, 3]))
        time.sleep(rng.uniform(0.0, 0.2))
        os.kill(pid, signal.SIGKILL)
        assert forker.exit_code() == -signal.SIGKILL
        saved = max((step for word, step in journal(tmp_path) if word == "saved"), default=0)
        started = max(step for word, step in journal(tmp_path) if word == "saving")
        candidate = newest_exact(tmp_path)
        newest = candidate.step if candidate else 0
        assert saved <= newest <= started
    assert newest >= 5  # the saves went on between the kills
    # The next writer removes what the last kill left, and the keep policy has held throughout.
    with CheckpointStore(tmp_path / "checkpoints", keep=2, report=lambda line: None) as store:
        store.sweep()
        assert not [p for p in store.directory.iterdir() if not p.name.isdigit()][1:]
        assert len(store.steps()) <= 3


@pytest.mark.parametrize(
    ("place", "newest", "left"),
    [
        ("checkpoint.arrays_written@3", 2, ["1", "2", "3.saving"]),
        ("checkpoint.manifest_written@3", 2, ["1", "2", "3.saving"]),
        ("checkpoint.step_listed@3", 3, ["1", "2", "3"]),
        ("checkpoint.step_unlisted", 3, ["1.deleting", "2", "3"]),
        ("checkpoint.step_half_deleted", 3, ["1.deleting", "2", "3"]),
    ],
)
def test_killed_at_each_failpoint(forker, tmp_path, place, newest, left):
    forker.start("save", tmp_path, environment={"MEMTRAIN_FAILPOINT": place})
    assert forker.exit_code() == -signal.SIGKILL
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [*left, "LOCK"]
    candidate = newest_exact(tmp_path)
    assert candidate is not None and candidate.step == newest
    # The same command again goes on from there and cleans up.
    since = len(journal(tmp_path))
    forker.start("save", tmp_path, until=newest + 1)
    assert forker.exit_code() == 0
    assert journal(tmp_path)[since] == ("resumed", newest)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [str(newest), str(newest + 1), "LOCK"]
    candidate = newest_exact(tmp_path)
    assert candidate is not None and candidate.step == newest + 1


@pytest.mark.parametrize("room", [1024, 200_000])
def test_a_full_disk_fails_the_save_and_spares_the_others(forker, errors, tmp_path, room):
    before = len(errors.read_text())
    forker.start("full", tmp_path, bytes=room)
    assert forker.exit_code() == 74
    text = errors.read_text()[before:]
    assert text.count("\n") == 1, text
    assert "checkpoint of step 2" in text and "earlier checkpoints are intact" in text
    assert "too large" in text.lower(), text
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["1", "LOCK"]
    store = CheckpointStore(tmp_path / "checkpoints")
    candidate = store.newest_valid()
    assert candidate is not None and candidate.step == 1
    # The save had returned by then: it was asynchronous.
    assert journal(tmp_path) == [("returned", 2)]


def test_a_second_job_is_refused_and_a_dead_one_is_succeeded(forker, tmp_path):
    pid = forker.start("lock", tmp_path, with_worker=True, environment={"SLURM_JOB_ID": "4242"})
    wait_for(tmp_path, "locked")
    worker = wait_for(tmp_path, "worker")
    try:
        with pytest.raises(BadInput, match=rf"pid {pid} on .*SLURM_JOB_ID=4242 since") as caught:
            RunLock(tmp_path).acquire()
        assert "\n" not in str(caught.value) and os.uname().nodename in str(caught.value)
        os.kill(pid, signal.SIGKILL)
        assert forker.exit_code() == -signal.SIGKILL
        # Its forked worker lives on, and must not hold the lock of the dead.
        os.kill(worker, 0)
        with RunLock(tmp_path) as lock:
            assert lock.held
            owner = json.loads((tmp_path / "LOCK").read_text())
            assert owner["pid"] == os.getpid()
    finally:
        os.kill(worker, signal.SIGKILL)
