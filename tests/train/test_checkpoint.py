"""The checkpoint store: values, structure, meshes, policy, and what a save costs the loop."""

import functools
import itertools
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from memtrain.errors import BadInput, CheckpointError, StorageFailed
from memtrain.train import keep, shards
from memtrain.train.checkpoint import CheckpointStore


def is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def raw(leaf: Any) -> bytes:
    return np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf).tobytes()


def abstract(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True)
    for (path, want), got in pairs:
        assert got.dtype == want.dtype and got.shape == want.shape, path
        assert raw(got) == raw(want), path


def noise(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def train_state() -> dict[str, Any]:
    params = {"embed": noise(0, 16, 8), "blocks": [{"w": noise(1, 8, 8)}, {"w": noise(2, 8, 8)}]}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return {"params": params, "optimizer": optimizer.init(params), "rng": jax.random.key(7)}


def newest_step(store: CheckpointStore) -> int | None:
    candidate = store.newest_valid()
    return candidate.step if candidate else None


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, lines: list[str]):
    with CheckpointStore(tmp_path / "checkpoints", report=lines.append) as opened:
        yield opened


def test_optax_state_and_keys_come_back_bit_for_bit(store, tmp_path):
    state = train_state()
    store.save(5, state, {"cursor": 640, "note": ["ü", None, 2.5]}, wait=True)
    reader = CheckpointStore(tmp_path / "checkpoints")
    candidate = reader.newest_valid()
    assert candidate is not None
    assert candidate.step == 5 and candidate.skipped == {}
    assert candidate.metadata == {"cursor": 640, "note": ["ü", None, 2.5]} == reader.metadata(5)
    restored = reader.restore(5, abstract(state))
    assert_same(restored, state)
    assert type(restored["optimizer"][1][0]) is type(state["optimizer"][1][0])
    # The stream of random numbers goes on where it was.
    expected = jax.random.normal(state["rng"], (3,))
    assert raw(jax.random.normal(restored["rng"], (3,))) == raw(expected)


SPECIALS = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3.4e38], np.float32)


@pytest.mark.parametrize(
    "leaf",
    [
        pytest.param(lambda: jnp.asarray(SPECIALS), id="float32-specials"),
        pytest.param(lambda: jnp.asarray(SPECIALS, jnp.bfloat16), id="bfloat16-specials"),
        pytest.param(lambda: jnp.asarray([0.1, -2], jnp.float16), id="float16"),
        pytest.param(lambda: jnp.asarray([1.5, -2], jnp.float8_e4m3fn), id="float8"),
        pytest.param(lambda: jnp.uint32(2**32 - 1), id="uint32-scalar"),
        pytest.param(lambda: jnp.asarray([[True], [False]]), id="bool"),
        pytest.param(lambda: jnp.arange(-3, 4, dtype=jnp.int8), id="int8"),
        pytest.param(lambda: jnp.zeros((0, 4), jnp.int32), id="empty"),
        pytest.param(lambda: jnp.zeros((64, 64)), id="all-zero"),
        pytest.param(lambda: jax.random.split(jax.random.key(3, impl="rbg"), 4), id="rbg-keys"),
        pytest.param(lambda: jax.random.split(jax.random.key(3), 0), id="no-keys"),
    ],
)
def test_every_dtype_comes_back_bit_for_bit(store, leaf):
    state = {"leaf": leaf(), "other": jnp.int32(1)}
    store.save(0, state, {}, wait=True)
    assert_same(store.restore(0, abstract(state)), state)


def test_names_hold_anything_and_stay_inside(store, tmp_path):
    names = ["../../evil", "a/b", "..", "a.b", "nul\0", "Ω" * 100, "%2E", " "]
    state: dict[str, Any] = {name: jnp.int32(number) for number, name in enumerate(names)}
    state["a"] = {"b": jnp.int32(99)}
    store.save(1, state, {}, wait=True)
    assert {"a.b", "a%2Fb", "a/b", "..", "%252E"} < set(store.leaves(1))
    assert_same(store.restore(1, abstract(state)), state)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    assert all(".." not in path.name for path in tmp_path.rglob("*"))


def test_containers_do_not_matter_only_names_do(store):
    point = namedtuple("point", ["x", "y"])
    store.save(1, {"p": point(noise(0, 2), noise(1, 3)), "l": (noise(2, 4),)}, {}, wait=True)
    as_dict = {"p": {"x": noise(0, 2), "y": noise(1, 3)}, "l": [noise(2, 4)]}
    assert_same(store.restore(1, abstract(as_dict)), as_dict)


class Twins:
    """A node that gives two leaves the same name, as a class registered by a user may."""


jax.tree_util.register_pytree_with_keys(
    Twins,
    lambda _: (((jax.tree_util.DictKey(0), 1.0), (jax.tree_util.DictKey("0"), 2.0)), None),
    lambda _aux, _children: Twins(),
)


def test_ambiguous_names_are_refused(store):
    with pytest.raises(ValueError, match="two leaves are named 'a/0'"):
        store.save(2, {"a": Twins()}, {})
    with pytest.raises(ValueError, match="empty key"):
        store.save(2, {"": noise(0, 1)}, {})
    with pytest.raises(ValueError, match="one bare array"):
        store.save(2, noise(0, 1), {})


def test_mismatches_are_named_and_never_cast(store):
    saved = {"kept": noise(0, 4), "gone": noise(1, 2), "grown": noise(2, 3), "half": noise(3, 2)}
    store.save(3, saved, {}, wait=True)
    wanted = {
        "kept": saved["kept"],
        "new": noise(1, 2),
        "grown": noise(2, 5),
        "half": jnp.zeros(2, jnp.bfloat16),
    }
    with pytest.raises(CheckpointError) as caught:
        store.restore(3, abstract(wanted))
    text = str(caught.value)
    assert "1 missing from the checkpoint: new" in text
    assert "1 in the checkpoint but not in this run: gone" in text
    assert "grown [3] saved, [5] wanted" in text
    assert "half float32 saved, bfloat16 wanted" in text
    assert "kept" not in text and "\n" not in text and caught.value.exit_code == 2
    with pytest.raises(CheckpointError, match="rng key<fry> saved, uint32 wanted"):
        store.save(4, {"rng": jax.random.split(jax.random.key(0), 2)}, {}, wait=True)
        store.restore(4, abstract({"rng": jnp.zeros(2, jnp.uint32)}))


def test_leaves_and_partial_restore(store):
    state = train_state()
    store.save(9, state, {}, wait=True)
    leaves = store.leaves(9)
    assert leaves["params/embed"] == ((16, 8), "float32")
    assert leaves["params/blocks/1/w"] == ((8, 8), "float32")
    assert leaves["optimizer/1/0/count"] == ((), "int32")
    assert leaves["rng"] == ((), "key<fry>")
    assert len(leaves) == len(jax.tree.leaves(state))
    params = {"params": state["params"]}
    assert_same(store.restore_partial(9, abstract(params)), params)
    with pytest.raises(CheckpointError, match="1 missing from the checkpoint: params/tail"):
        store.restore_partial(9, abstract({"params": {"tail": noise(0, 1)}}))
    with pytest.raises(CheckpointError, match="has no step 8; it has: 9"):
        store.leaves(8)


def test_only_global_arrays_and_plain_metadata(store):
    with pytest.raises(TypeError, match=r"leaf 'a' is a ndarray, not a jax.Array"):
        store.save(1, {"a": np.zeros(2)}, {})
    with pytest.raises(TypeError, match="survive JSON"):
        store.save(1, {"a": noise(0, 1)}, {"shape": (1, 2)})
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.save(1, {"a": noise(0, 1)}, {"loss": float("nan")})
    assert store.steps() == [] and store.newest_valid() is None


MESHES = {"8": (8,), "4x2": (4, 2), "2x2": (2, 2), "1": (1,)}


def on_mesh(shape: tuple[int, ...], tree: Any, *, transpose: bool = False) -> Any:
    axes = ("x", "y")[: len(shape)]
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    mesh = jax.sharding.Mesh(devices, axes)

    def place(leaf: jax.Array) -> jax.Array:
        spec = (axes[::-1] if transpose else axes) if leaf.ndim == 2 else ()
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(place, tree)


@pytest.mark.parametrize("saved_on", MESHES)
def test_saved_on_one_mesh_restored_on_every_other(store, saved_on):
    plain = {"w": noise(0, 16, 24), "b": noise(1, 5), "key": jax.random.key(1)}
    store.save(1, on_mesh(MESHES[saved_on], plain), {}, wait=True)
    for restored_on, transpose in itertools.product(MESHES, (False, True)):
        target = abstract(on_mesh(MESHES[restored_on], plain, transpose=transpose))
        restored = store.restore(1, target)
        assert_same(restored, plain)
        for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
            assert got.sharding.is_equivalent_to(want.sharding, got.ndim), restored_on
    without = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), plain)
    assert store.restore(1, without)["w"].sharding == SingleDeviceSharding(jax.devices()[0])


def test_the_manifest_says_how_it_was_written(store, tmp_path):
    store.save(1, on_mesh((4, 2), {"w": noise(0, 16, 24)}), {}, wait=True)
    written = store._manifest(1)
    assert written.topology["mesh"] == {"x": 4, "y": 2}
    assert written.topology["process_count"] == 1
    assert written.versions["jax"] == jax.__version__
    assert written.versions["orbax-checkpoint"].startswith("0.12.")
    listed = {path for path in (tmp_path / "checkpoints/1").rglob("*") if path.is_file()}
    names = {str(path.relative_to(tmp_path / "checkpoints/1")) for path in listed}
    assert names == {*written.files, "MANIFEST.json"}


@pytest.mark.parametrize("mesh", ["8", "1"])
def test_donated_arrays_are_saved_as_they_were(store, mesh):
    @functools.partial(jax.jit, donate_argnums=0)
    def train(tree):
        return jax.tree.map(lambda leaf: leaf * 0 - 7, tree)

    plain = {str(i): np.asarray(noise(i, 256, 256)) for i in range(20)}
    for step in range(3):
        tree = on_mesh(MESHES[mesh], plain)
        target = abstract(tree)
        store.save(step, tree, {})
        tree = train(tree)
        jax.block_until_ready(train(tree))
        store._wait()
        assert_same(store.restore(step, target), plain)


def test_keep_policy(tmp_path):
    with CheckpointStore(tmp_path, keep=2, keep_every_steps=4) as store:
        for step in range(1, 11):
            store.save(step, {"w": noise(step, 2)}, {}, wait=True)
    assert store.steps() == [4, 8, 9, 10]
    assert keep.doomed([3, 1, 2], keep=1, keep_every_steps=None) == [1, 2]
    assert keep.doomed([0, 5, 10], keep=1, keep_every_steps=5) == []
    with pytest.raises(BadInput, match="at least 1"):
        CheckpointStore(tmp_path, keep=0)


def test_garbage_collection_leaves_what_is_not_ours(store, tmp_path, lines):
    foreign = tmp_path / "checkpoints/1"
    foreign.mkdir(parents=True)
    (foreign / "thesis.txt").write_text("mine")
    for step in range(2, 8):
        store.save(step, {"w": noise(step, 2)}, {}, wait=True)
    assert (foreign / "thesis.txt").read_text() == "mine"
    assert store.steps() == [1, 5, 6, 7]
    assert [line for line in lines if "step 1 is old but not deleted" in line]


def test_a_saved_step_is_not_written_twice_and_an_invalid_one_is_moved_aside(
    store, tmp_path, lines
):
    (tmp_path / "checkpoints/2").mkdir(parents=True)
    store.save(2, {"w": noise(0, 2)}, {"try": 1}, wait=True)
    assert (tmp_path / "checkpoints/2.invalid").is_dir() and "kept as 2.invalid" in lines[-1]
    store.save(2, {"w": noise(1, 2)}, {"try": 2}, wait=True)
    assert "already saved" in lines[-1]
    assert store.metadata(2) == {"try": 1}


def test_failure_of_the_background_write_is_raised_once_at_the_next_call(
    store, tmp_path, monkeypatch
):
    store.save(1, {"w": noise(0, 2)}, {}, wait=True)

    class Refused:
        def result(self) -> None:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "start_write", lambda directory, named: Refused())
        for collect in (store.poll, store._wait, lambda: store.save(3, {"w": noise(0, 2)}, {})):
            store.save(2, {"w": noise(1, 2)}, {})
            assert store._writing is not None
            store._writing.join()
            with pytest.raises(StorageFailed, match=r"step 2 .*No space left.*intact") as caught:
                collect()
            assert caught.value.exit_code == 74 and "\n" not in str(caught.value)
            store.poll()
    assert [path.name for path in tmp_path.glob("checkpoints/*.saving")] == []
    assert newest_step(store) == 1
    store.save(2, {"w": noise(1, 2)}, {}, wait=True)
    assert newest_step(store) == 2


def test_a_bug_of_ours_is_not_called_a_storage_failure(store, monkeypatch):
    def broken(*_: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr("memtrain.train.manifest.write", broken)
    with pytest.raises(AssertionError, match="a bug"):
        store.save(1, {"w": noise(0, 2)}, {}, wait=True)


def test_a_disk_without_room_is_refused_before_the_first_byte(store, tmp_path, monkeypatch):
    store.save(1, {"w": noise(0, 2)}, {}, wait=True)
    usage = shutil.disk_usage(tmp_path)._replace(free=4 * 512 * 512)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StorageFailed, match=r"needs 2097152 bytes and .* has 1048576 free"):
        store.save(2, {"w": noise(0, 512, 512)}, {})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "LOCK"]


def test_close_raises_and_a_closed_store_refuses(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, {"w": noise(0, 2)}, {})
    store.close()
    assert store.steps() == [1] and newest_step(store) == 1
    with pytest.raises(RuntimeError, match="closed"):
        store.save(2, {"w": noise(0, 2)}, {})


def test_a_failed_save_does_not_hide_what_ended_the_run(tmp_path, monkeypatch):
    class Refused:
        def result(self) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "start_write", lambda directory, named: Refused())
    lines: list[str] = []
    with (
        pytest.raises(ZeroDivisionError),
        CheckpointStore(tmp_path, report=lines.append) as store,
    ):
        store.save(1, {"w": noise(0, 2)}, {})
        raise ZeroDivisionError
    assert len(lines) == 1 and "No space left" in lines[0]
    with pytest.raises(StorageFailed), CheckpointStore(tmp_path) as store:
        store.save(1, {"w": noise(0, 2)}, {})


def test_orbax_is_imported_only_when_needed():
    code = (
        "import sys, time, memtrain.train.checkpoint as c; from pathlib import Path; "
        "s = c.CheckpointStore(Path('/nonexistent')); assert s.newest_valid() is None; "
        "assert 'orbax.checkpoint' not in sys.modules; s.warm_up(); c.shards.orbax(); "
        "assert 'orbax.checkpoint' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_second_writer_is_refused_and_a_reader_is_not(store, tmp_path):
    store.save(1, {"w": noise(0, 2)}, {}, wait=True)
    other = CheckpointStore(tmp_path / "checkpoints")
    assert newest_step(other) == 1
    with pytest.raises(BadInput, match="is being written by pid"):
        other.save(2, {"w": noise(0, 2)}, {})
    store.close()
    other.save(2, {"w": noise(0, 2)}, {}, wait=True)
    other.close()


def test_ten_megabytes_block_the_loop_for_milliseconds(store):
    state = {f"layer{i}": noise(i, 256, 256) for i in range(40)}
    store.save(0, state, {}, wait=True)  # imports Orbax
    blocked, restored = [], []
    for step in range(1, 6):
        start = time.perf_counter()
        store.save(step, state, {})
        blocked.append(time.perf_counter() - start)
        store._wait()
        start = time.perf_counter()
        store.restore(step, abstract(state))
        restored.append(time.perf_counter() - start)
    # 16 ms and 60 ms were seen; a busy machine gets slack, a synchronous save would not fit.
    assert min(blocked) < 0.1, blocked
    assert min(restored) < 0.7, restored


def test_nothing_is_left_running(store):
    before = {thread.name for thread in threading.enumerate()}
    store.save(1, {"w": noise(0, 2)}, {}, wait=True)
    left = {t.name for t in threading.enumerate() if not t.daemon} - before
    assert not [name for name in left if name.startswith("save-")]


def test_what_a_failed_save_cannot_remove_goes_before_the_next(store, tmp_path, monkeypatch):
    store.sweep()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None)
        left = tmp_path / "checkpoints/1.saving"
        left.mkdir()
        keep.discard(left, patience_s=0.05)
        assert left.exists()
    store.save(2, {"w": noise(0, 2)}, {}, wait=True)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "LOCK"]


def test_an_early_end_waits_for_the_import(tmp_path):
    """Else C++ ends the process, and the exit code of what went wrong is lost."""
    program = (
        "import atexit, sys\n"
        "from pathlib import Path\n"
        "from memtrain.train.checkpoint import CheckpointStore, shards\n"
        "atexit.register(lambda: print(shards.orbax.cache_info().currsize))\n"
        "with CheckpointStore(Path('checkpoints')) as store:\n"
        "    store.warm_up()\n"
        "    sys.exit(2)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "1\n", "")
