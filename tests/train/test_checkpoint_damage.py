"""Damaged and foreign things in `checkpoints/`: found, named, passed over, never loaded."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memtrain.errors import CheckpointError
from memtrain.train import manifest
from memtrain.train.checkpoint import CheckpointStore


STATE = {
    "weights": np.random.default_rng(0).standard_normal((64, 64), np.float32),
    "moments": np.zeros((64, 64), np.float32),
    "count": np.int32(7),
}


def state(step: int) -> dict[str, jax.Array]:
    return {name: jnp.asarray(leaf + leaf.dtype.type(step)) for name, leaf in STATE.items()}


def restored_exactly(store: CheckpointStore, step: int) -> bool:
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state(step))
    found = store.restore(step, target)
    return all(
        np.asarray(found[name]).tobytes() == np.asarray(leaf).tobytes()
        for name, leaf in state(step).items()
    )


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    with CheckpointStore(directory) as store:
        for step in (10, 20):
            store.save(step, state(step), {"cursor": step * 16}, wait=True)
    return directory


@pytest.fixture
def run(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "checkpoints"))


def newest(directory: Path) -> tuple[int | None, list[str]]:
    lines: list[str] = []
    candidate = CheckpointStore(directory, report=lines.append).newest_valid()
    return candidate.step if candidate else None, lines


def files_of(directory: Path, step: int) -> list[Path]:
    return sorted(path for path in (directory / str(step)).rglob("*") if path.is_file())


def test_one_flipped_bit_anywhere_is_found(run):
    """Orbax alone brought 167 of 180 such flips back as silently wrong weights."""
    random = np.random.default_rng(2)
    files = [path for path in files_of(run, 20) if path.stat().st_size]
    for path in files:
        content = path.read_bytes()
        for offset in random.integers(len(content), size=20):
            damaged = bytearray(content)
            damaged[offset] ^= 1 << int(random.integers(8))
            path.write_bytes(damaged)
            step, lines = newest(run)
            assert step == 10, (path, offset)
            assert len(lines) == 1 and lines[0].startswith("skipped step 20: ")
            assert path.name in lines[0]
        path.write_bytes(content)
    assert newest(run) == (20, [])
    assert restored_exactly(CheckpointStore(run), 20)


@pytest.mark.parametrize("damage", ["truncate", "empty", "zero", "grow", "delete", "link", "dir"])
def test_every_file_of_a_step_is_needed_whole(run, tmp_path, damage):
    for path in files_of(run, 20):
        content = path.read_bytes()
        if not content and damage in ("truncate", "empty", "zero"):
            continue
        path.unlink()
        if damage == "truncate":
            path.write_bytes(content[:-1])
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "zero":
            path.write_bytes(bytes(len(content)))
        elif damage == "grow":
            path.write_bytes(content + b"\0")
        elif damage == "link":
            (tmp_path / "elsewhere").write_bytes(content)
            path.symlink_to(tmp_path / "elsewhere")
        elif damage == "dir":
            path.mkdir()
        step, lines = newest(run)
        assert step == 10 and len(lines) == 1, path
        assert path.name in lines[0]
        if damage == "dir":
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(content)
    assert newest(run) == (20, [])


def test_what_is_not_a_step_is_passed_over_with_a_line(run, tmp_path):
    (run / "99").mkdir()
    (run / "100").write_text("not a directory")
    (run / "1e3").mkdir()
    (run / "007").mkdir()
    shutil.copytree(run / "20", tmp_path / "outside")
    (run / "500").symlink_to(tmp_path / "outside")
    shutil.copytree(run / "20", run / "600")
    shutil.copytree(run / "20", run / "700.saving")
    shutil.copytree(run / "10", run / "5.deleting")
    step, lines = newest(run)
    assert step == 20
    expected = {
        "99": "has no MANIFEST.json",
        "100": "a file, not a directory",
        "1e3": "not the name of a step",
        "007": "not the name of a step",
        "500": "a symbolic link",
        "600": "is of step 20, not of 600",
        "700.saving": "an unfinished save",
        "5.deleting": "an unfinished deletion",
    }
    assert len(lines) == len(expected)
    for name, reason in expected.items():
        assert [line for line in lines if name in line and reason in line], name
    with pytest.raises(CheckpointError, match="symbolic link"):
        CheckpointStore(run).metadata(500)


def test_a_writer_sweeps_only_leftovers(run):
    shutil.copytree(run / "20", run / "30.saving")
    shutil.copytree(run / "10", run / "5.deleting")
    (run / "notes.saving").mkdir()
    lines: list[str] = []
    with CheckpointStore(run, report=lines.append) as store:
        store.sweep()
        assert store.steps() == [10, 20]
    assert sorted(path.name for path in run.iterdir()) == ["10", "20", "LOCK", "notes.saving"]
    assert len(lines) == 2


def test_candidates_without_a_valid_one_are_an_error(run):
    for step in (10, 20):
        largest = max(files_of(run, step), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-1])
    before = sorted(run.rglob("*"))
    with pytest.raises(CheckpointError, match="2 checkpoints and none is valid") as caught:
        newest(run)
    text = str(caught.value)
    assert "\n" not in text and "20: " in text and "10: " in text
    assert sorted(run.rglob("*")) == before
    store = CheckpointStore(run, report=lambda line: None)
    with pytest.raises(CheckpointError, match="is not valid"):
        restored_exactly(store, 20)


def test_no_directory_means_nothing_to_resume(tmp_path):
    assert newest(tmp_path / "never") == (None, [])
    (tmp_path / "1e3").mkdir()
    assert newest(tmp_path)[0] is None


def test_damage_does_not_survive_the_next_save(run):
    largest = max(files_of(run, 20), key=lambda path: path.stat().st_size)
    largest.write_bytes(bytes(largest.stat().st_size))
    lines: list[str] = []
    with CheckpointStore(run, keep=1, report=lines.append) as store:
        candidate = store.newest_valid()
        assert candidate is not None and candidate.step == 10
        store.save(15, state(15), {}, wait=True)
        # The damaged 20 is not counted by the policy: 15 is the one to keep.
        assert store.steps() == [15, 20]
        store.save(20, state(20), {}, wait=True)
        assert store.steps() == [20] and (run / "20.invalid").is_dir()
        assert restored_exactly(store, 20)


def hostile_manifests(good: dict) -> list[bytes]:
    def changed(**fields: object) -> bytes:
        # With a right digest of its own: a bad manifest made on purpose.
        content = {k: v for k, v in (good | fields).items() if k != "sha256"}
        text = json.dumps(content, sort_keys=True, indent=1) + "\n"
        content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        return (json.dumps(content, sort_keys=True, indent=1) + "\n").encode()

    digest = [1, "0" * 64]
    names = ("../20/x", "/etc/passwd", "a/../../b", "", "a//b", "./a", "a\0b")
    return [
        b"",
        b"null",
        b"[]",
        b"{",
        b"[" * 100_000,
        b"\xff\xfe",
        b"\x80\x04]\x94.",
        *(changed(files={name: digest}) for name in names),
        changed(files={"a": [1, "no"]}),
        changed(files={"a": [-1, "0" * 64]}),
        changed(files={"a": [1.5, "0" * 64]}),
        changed(files={"a": {}}),
        changed(files=[]),
        changed(leaves={"a": {}}),
        changed(leaves={"a": {"shape": [-1], "dtype": "float32"}}),
        changed(leaves={"a": {"shape": [1], "dtype": 3}}),
        changed(leaves={"a": {"shape": 5, "dtype": "x"}}),
        changed(leaves=[]),
        changed(metadata=None),
        changed(step="20"),
        changed(step=True),
        changed(step=-1),
        changed(step=1e400),
        changed(sha256=None)[:-1],
        changed(format=0),
        changed(format=None),
        changed(extra=1),
        json.dumps({k: v for k, v in good.items() if k != "step"}).encode(),
        json.dumps(good, sort_keys=True).encode(),
        changed(),
    ]


def test_hostile_manifests_are_refused_with_one_line(run):
    path = run / "20" / manifest.FILE_NAME
    good = json.loads(path.read_bytes())
    # The test's own digest is the right one: what is refused below is refused for its content.
    assert hostile_manifests(good)[-1] == path.read_bytes()
    for content in hostile_manifests(good)[:-1]:
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            manifest.read(run / "20")
        assert "\n" not in str(caught.value), content[:80]
    path.write_bytes(json.dumps(good | {"format": 2, "new_field": 1}).encode())
    with pytest.raises(CheckpointError, match=r"newer memtrain .*format 2.*upgrade"):
        manifest.read(run / "20")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="regular file"):
        manifest.read(run / "20")


def test_random_bytes_never_become_a_manifest(run):
    path = run / "20" / manifest.FILE_NAME
    content = path.read_bytes()
    random = np.random.default_rng(5)
    for _ in range(500):
        damaged = bytearray(content)
        for _ in range(random.integers(1, 5)):
            start = int(random.integers(len(damaged)))
            kind = random.integers(3)
            if kind == 0:
                del damaged[start : start + int(random.integers(1, 50))]
            elif kind == 1:
                damaged[start:start] = random.bytes(int(random.integers(1, 50)))
            else:
                damaged[start] ^= 1 << int(random.integers(8))
        if bytes(damaged) == content:
            continue
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            manifest.read(run / "20")


def test_no_pickle_is_written_or_read(run, tmp_path):
    """A pickle beside the data is not opened: the canary that it would make is not there."""
    canary = tmp_path / "canary"
    payload = b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    for name in ("state.pkl", "data.pickle", "arrays/state/tree.pkl", "weights.pt"):
        (run / "20" / name).write_bytes(payload)
    assert newest(run) == (20, [])
    assert restored_exactly(CheckpointStore(run), 20)
    assert not canary.exists()
    for path in files_of(run, 10):
        assert not path.read_bytes().startswith(b"\x80"), path
