"""Whether the training state fits its devices, before any of it is allocated."""

from __future__ import annotations

import math
import os
from typing import Any

import jax

from memtrain.errors import BadInput
from memtrain.train.state import Plan
from memtrain.train.tables import PREFIX


_SPARE = 0.97
"""Share of the memory that the state may take; what is left is not enough for any step either."""


def device_bytes(device: Any) -> int | None:
    """Memory of one device; of the machine, shared by them, where devices are simulated."""
    if device.platform == "cpu":
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return whole // len(jax.local_devices())
    return (device.memory_stats() or {}).get("bytes_limit")


def check_room(plan: Plan, available: int | None) -> None:
    """Raises BadInput if a device's share of parameters, moments and carried state is more than
    `available` bytes, with the number of slots that would fit where a memory table is to blame.
    """
    if available is None:
        return
    state = plan.abstract()
    _check_host(state, available)
    needed = sum(_share(leaf) for leaf in jax.tree.leaves(state) if not _is_elsewhere(leaf))
    if needed <= available * _SPARE:
        return
    message = (
        f"the training state takes {_gib(needed)} of each device's {_gib(available)}, before any "
        "activation"
    )
    tables = {name: _of_table(state, name) for name in plan.skeleton.tables}
    if not any(tables.values()):
        raise BadInput(f"{message}: make the model smaller, or split it over more devices")
    name = max(tables, key=lambda name: tables[name])
    rows = plan.skeleton.shapes[name].shape[0]
    left = available * _SPARE - (needed - tables[name])
    fits = math.isqrt(max(0, int(rows * left / tables[name]))) ** 2
    hint = f"num_slots={fits:,} fits" if fits else "no number of slots fits"
    raise BadInput(
        f"{message}: table {name.removeprefix(PREFIX)!r} of {rows:,} slots takes "
        f"{_gib(tables[name])} of it with its moments; {hint}, or split its rows over more devices "
        "(mesh.fsdp)" + _or_host(plan)
    )


def _or_host(plan: Plan) -> str:
    """Where that would be more memory, and the table may go there."""
    if jax.local_devices()[0].platform == "cpu" or not plan.tables.names:
        return ""
    return ", or keep it in host memory (mesh.table_memory=host)"


def _check_host(state: Any, available: int) -> None:
    """Tables in host memory have to fit there; where devices are simulated, beside all else."""
    local = jax.local_devices()
    hosted = sum(_share(leaf) for leaf in jax.tree.leaves(state) if _is_elsewhere(leaf))
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if local[0].platform == "cpu":
        has = available * len(local)
    if hosted * len(local) > has * _SPARE:
        raise BadInput(
            f"mesh.table_memory=host: tables and their moments take {_gib(hosted * len(local))} of "
            f"this host's {_gib(has)}: split their rows over more hosts (mesh.fsdp), or give them "
            "fewer slots"
        )


def _of_table(state: Any, name: str) -> int:
    """Bytes on a device of a table and what the optimizer keeps of it."""
    flat, _ = jax.tree_util.tree_flatten_with_path((state.parameters, state.optimizer))
    return sum(
        _share(leaf)
        for path, leaf in flat
        if any(getattr(entry, "key", None) == name for entry in path) and not _is_elsewhere(leaf)
    )


def _is_elsewhere(leaf: Any) -> bool:
    """In the host's memory, which has its own end."""
    return leaf.sharding.memory_kind == "pinned_host"


def _share(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
