"""Two processes on this machine go on from what one saved, and one from what they saved."""

import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memtrain.train.checkpoint import CheckpointStore


PEER = Path(__file__).with_name("checkpoint_peer.py")
pytestmark = pytest.mark.full


def values(step: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(step)
    return {
        "sharded": random.standard_normal((64, 32), np.float32),
        "rows": random.standard_normal((8, 3), np.float32),
        "replicated": random.standard_normal((5,), np.float32),
        "count": np.array(step, np.int32),
    }


def run_job(run: Path, count: int = 2) -> list[tuple[int, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    peers = [
        subprocess.Popen(
            [sys.executable, str(PEER), str(index), str(count), str(port), str(run)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(count)
    ]
    try:
        outputs = [peer.communicate(timeout=90)[0] for peer in peers]
    finally:
        for peer in peers:
            peer.kill()
    return [(peer.returncode, output) for peer, output in zip(peers, outputs, strict=True)]


def test_one_saves_two_go_on_and_one_restores(tmp_path):
    with CheckpointStore(tmp_path / "checkpoints") as store:
        tree = {name: jnp.asarray(leaf) for name, leaf in values(7).items()}
        store.save(7, tree, {"cursor": 70}, wait=True)
    (tmp_path / "checkpoints/99").mkdir()

    for index, (code, output) in enumerate(run_job(tmp_path)):
        assert "restored 7 70" in output, output
        # Process 0 speaks for the job; the failure of process 1 fails the save on both.
        assert ("skipped step 99" in output) == (index == 0), output
        assert code == 74, output
        assert "StorageFailed checkpoint of step 11" in output, output
        assert "process 1: " in output and "Input/output error" in output, output

    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["10", "9", "99", "LOCK"]
    store = CheckpointStore(tmp_path / "checkpoints", report=lambda line: None)
    candidate = store.newest_valid()
    assert candidate is not None and candidate.step == 10 and candidate.metadata == {"cursor": 100}
    assert store._manifest(10).topology["process_count"] == 2
    want = values(10)
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in want.items()}
    for name, leaf in store.restore(10, shapes).items():
        assert np.asarray(leaf).tobytes() == want[name].tobytes(), name
