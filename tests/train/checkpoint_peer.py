"""One process of a job of several that saves and restores; driven by test_checkpoint_processes.py.

Arguments: process index, process count, coordinator port, run directory.
"""

import os
import sys
from pathlib import Path


os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from memtrain.errors import MemtrainError
from memtrain.train import agree, manifest
from memtrain.train.checkpoint import CheckpointStore


def values(step: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(step)
    return {
        "sharded": random.standard_normal((64, 32), np.float32),
        "rows": random.standard_normal((8, 3), np.float32),
        "replicated": random.standard_normal((5,), np.float32),
        "count": np.array(step, np.int32),
    }


SPECS = {"sharded": ("x", "y"), "rows": ("x",), "replicated": (), "count": ()}


def broken(*_: object, **__: object) -> dict:
    raise OSError(5, "Input/output error")


def main() -> int:
    index, count, port, run = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{port}", int(count), int(index), heartbeat_timeout_seconds=20
    )
    agree.TIMEOUT_S = 30.0
    devices = np.array(jax.devices()).reshape(2, -1)
    mesh = jax.sharding.Mesh(devices, ("x", "y"))
    shardings = {name: NamedSharding(mesh, PartitionSpec(*spec)) for name, spec in SPECS.items()}

    def tree(step: int) -> dict[str, jax.Array]:
        return {
            name: jax.make_array_from_callback(
                leaf.shape, shardings[name], lambda part, leaf=leaf: leaf[part]
            )
            for name, leaf in values(step).items()
        }

    def check(store: CheckpointStore, step: int) -> None:
        shapes = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
            for name, leaf in values(step).items()
        }
        for name, leaf in store.restore(step, shapes).items():
            for part in leaf.addressable_shards:
                assert np.array_equal(np.asarray(part.data), values(step)[name][part.index]), name

    try:
        with CheckpointStore(Path(run) / "checkpoints", keep=2) as store:
            # What one process saved, two restore.
            candidate = store.newest_valid()
            assert candidate is not None
            print("restored", candidate.step, candidate.metadata["cursor"], flush=True)
            check(store, candidate.step)
            for step in (8, 9, 10):
                store.save(step, tree(step), {"cursor": step * 10})
            store.save(10, tree(10), {"cursor": 0}, wait=True)
            candidate = store.newest_valid()
            assert candidate is not None and candidate.step == 10
            check(store, 10)
            if index == "1":
                # From here on this process alone cannot read back what it wrote.
                manifest.digest_files = broken
            store.save(11, tree(11), {"cursor": 110}, wait=True)
    except MemtrainError as error:
        print(type(error).__name__, error, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    code = main()
    jax.distributed.shutdown()
    sys.exit(code)
