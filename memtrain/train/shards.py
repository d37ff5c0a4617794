"""Arrays to and from disk through Orbax v1. Nothing else in memtrain imports Orbax.

Orbax is imported at first use: it costs half a second, which a command that only prints should not
pay. On disk a checkpoint is a flat dictionary from `stored_name` to array.
"""

import functools
import logging
import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from memtrain.train import agree
from memtrain.train.leaves import is_key, stored_name


# Files of this size can be digested in parallel and by several hosts.
_TARGET_FILE_BYTES = 512 << 20


@functools.cache
def orbax() -> Any:
    """The `orbax.checkpoint.v1` module."""
    from orbax.checkpoint import v1

    logging.getLogger("absl").addFilter(_is_news)
    return v1


def _is_news(record: logging.LogRecord) -> bool:
    # Orbax logs a traceback of 200 lines for each error that it also raises, which we report.
    return not (record.levelno >= logging.ERROR and "orbax" in Path(record.pathname).parts)


def import_in_background() -> threading.Thread:
    """Import Orbax while the main thread waits for the compiler, and not at the first save.

    Join the thread before the process ends: one that ends while a library in C++ is being loaded is
    aborted by it, and its exit code is lost.
    """
    thread = threading.Thread(target=orbax, name="import-orbax", daemon=True)
    thread.start()
    return thread


def num_bytes(named: Mapping[str, jax.Array]) -> int:
    """Bytes of all leaves over all processes; replicas count once."""
    return sum(math.prod(leaf.shape) * _itemsize(leaf) for leaf in named.values())


def describe(named: Mapping[str, jax.Array]) -> dict[str, dict[str, Any]]:
    """The `leaves` table of the manifest."""
    table: dict[str, dict[str, Any]] = {}
    for name, leaf in named.items():
        table[name] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        if is_key(leaf):
            table[name]["key_impl"] = str(jax.random.key_impl(leaf))
    return table


def topology(named: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Mesh, devices and processes that wrote these arrays; for the reader, not for restore."""
    mesh: dict[str, int] = {}
    for leaf in named.values():
        if isinstance(leaf.sharding, jax.sharding.NamedSharding) and leaf.sharding.mesh.shape:
            mesh = {str(axis): int(size) for axis, size in leaf.sharding.mesh.shape.items()}
            break
    return {
        "mesh": mesh,
        "process_count": agree.process_count(),
        "device_count": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
    }


def check_savable(named: Mapping[str, Any]) -> None:
    """TypeError naming a leaf that is no jax.Array, or in a job of many not a global one."""
    for name, leaf in named.items():
        if not isinstance(leaf, jax.Array):
            raise TypeError(f"leaf {name!r} is a {type(leaf).__name__}, not a jax.Array")
        if agree.process_count() > 1 and leaf.is_fully_addressable:
            raise TypeError(f"leaf {name!r} lives on this process alone: make it a global array")


def start_write(directory: Path, named: Mapping[str, jax.Array]) -> Any:
    """Begin to write; returns once the device memory may be reused, with an Orbax response.

    `.result()` of the response waits until every process has written and `directory` is complete.
    """
    ocp = orbax()
    # Arrays without elements have no data: Orbax refuses them, and the manifest knows their shape.
    flat = {
        stored_name(name): jax.random.key_data(leaf) if is_key(leaf) else leaf
        for name, leaf in named.items()
        if leaf.size
    }
    context = ocp.Context()
    # Weights are noise to a compressor: 7 percent smaller for a second of CPU a gigabyte.
    context.array.saving.use_compression = False
    context.array.saving.ocdbt_target_data_file_size = _TARGET_FILE_BYTES
    context.asynchronous.timeout_secs = int(agree.TIMEOUT_S)
    with context:
        return ocp.save_async(directory, flat)


def read(
    directory: Path, wanted: Mapping[str, Any], key_impls: Mapping[str, str]
) -> dict[str, jax.Array]:
    """Read leaves as the ShapeDtypeStructs in `wanted` say; others in the file are left alone."""
    ocp = orbax()
    flat = {
        stored_name(name): _on_disk(name, leaf)
        for name, leaf in wanted.items()
        if math.prod(leaf.shape)
    }
    restored: Mapping[str, jax.Array] = {}
    if flat:
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            restored = ocp.load(directory, flat)
    arrays: dict[str, jax.Array] = {}
    for name, leaf in wanted.items():
        if not math.prod(leaf.shape):
            arrays[name] = _empty(leaf, key_impls.get(name))
        elif is_key(leaf):
            data = restored[stored_name(name)]
            arrays[name] = jax.random.wrap_key_data(data, impl=key_impls[name])
        else:
            arrays[name] = restored[stored_name(name)]
    return arrays


def _itemsize(leaf: jax.Array) -> int:
    return leaf.dtype.itemsize


def _on_disk(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
    """The struct of the stored array: a PRNG key is stored as its words."""
    sharding = _sharding(name, leaf)
    if not is_key(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=sharding)


def _sharding(name: str, leaf: Any) -> jax.sharding.Sharding:
    sharding = getattr(leaf, "sharding", None)
    if sharding is not None:
        return sharding
    if agree.process_count() > 1:
        raise TypeError(f"leaf {name!r} needs a sharding to be restored in a job of many processes")
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _empty(leaf: Any, key_impl: str | None) -> jax.Array:
    if key_impl is not None:
        words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        empty = jax.random.wrap_key_data(jnp.zeros(words.shape, words.dtype), impl=key_impl)
    else:
        empty = jnp.zeros(leaf.shape, leaf.dtype)
    return jax.device_put(empty, getattr(leaf, "sharding", None))
