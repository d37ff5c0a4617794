"""Runs checkpoint saves in processes that can be killed; driven by test_checkpoint_crash.py.

Reads one JSON order a line on stdin: {"run": DIR, "do": NAME, ...}. Each order is carried out in a
fork (JAX and Orbax are imported once, which takes seconds), its pid is printed as a line, and when
it has ended its exit code, negative for a signal. The child appends what it does to DIR/journal.
"""

import json
import os
import resource
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any


os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import numpy as np

from memtrain.errors import MemtrainError
from memtrain.train import shards
from memtrain.train.checkpoint import CheckpointStore
from memtrain.train.run_dir import RunLock


NUM_LEAVES = 6
LEAF_SHAPE = (128, 256)


def values(step: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(step)
    return {f"w{i}": random.standard_normal(LEAF_SHAPE, np.float32) for i in range(NUM_LEAVES)}


class Journal:
    def __init__(self, run: Path):
        self.descriptor = os.open(run / "journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, word: str, step: int = 0) -> None:
        os.write(self.descriptor, f"{word} {step}\n".encode())


def save_until_killed(run: Path, order: dict[str, Any]) -> None:
    journal = Journal(run)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    store = CheckpointStore(run / "checkpoints", keep=2)
    candidate = store.newest_valid()
    step = candidate.step if candidate else 0
    journal.write("resumed", step)
    while step < order.get("until", 10**9):
        step += 1
        tree = {name: jax.device_put(leaf, sharding) for name, leaf in values(step).items()}
        journal.write("saving", step)
        store.save(step, tree, {"step": step})
        store._wait()
        journal.write("saved", step)
    store.close()


def save_on_a_full_disk(run: Path, order: dict[str, Any]) -> None:
    with CheckpointStore(run / "checkpoints") as store:
        tree = jax.tree.map(jax.numpy.asarray, values(1))
        store.save(1, tree, {}, wait=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["bytes"], resource.RLIM_INFINITY))
        store.save(2, jax.tree.map(jax.numpy.asarray, values(2)), {})
        Journal(run).write("returned", 2)


def hold_the_lock(run: Path, order: dict[str, Any]) -> None:
    RunLock(run).acquire()
    if order.get("with_worker"):
        worker = os.fork()
        if worker == 0:
            time.sleep(30)
            os._exit(0)
        Journal(run).write("worker", worker)
    Journal(run).write("locked", os.getpid())
    time.sleep(30)


ORDERS = {
    "save": save_until_killed,
    "full": save_on_a_full_disk,
    "lock": hold_the_lock,
}


def child(order: dict[str, Any]) -> int:
    os.environ.update(order.get("environment", {}))
    try:
        ORDERS[order["do"]](Path(order["run"]), order)
    except MemtrainError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    # The fork happens before any backend, and so any thread of JAX, exists.
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
    shards.orbax()
    print("ready", flush=True)
    # Not `for line in sys.stdin`: a fork must not inherit a half-read buffer.
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            os._exit(child(json.loads(line)))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
