"""One table from logical axes to mesh axes, for parameters, optimizer, activations and memories."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memtrain.memory.protocol import LeafSpec, map_spec
from memtrain_kernels import partitioned


RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "time": "context",
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "slots": "fsdp",  # rows of memory tables
    "value_dim": "tensor",
    "layers": None,
    "cache": "context",
    "head_dim": None,
    "key_dim": None,
}


def partition_spec(
    axes: Sequence[str | None], mesh: Mesh, shape: Sequence[int] | None = None
) -> PartitionSpec:
    """Mesh axes of an array with these logical axes.

    A dimension that its mesh axes do not divide is replicated (`replicated_dims` names them), and a
    mesh axis serves one dimension only: the first that asks for it.
    """
    used: set[str] = set()
    entries: list[Any] = []
    for dim, axis in enumerate(axes):
        rule = None if axis is None else RULES[axis]
        names = (rule,) if isinstance(rule, str) else tuple(rule or ())
        names = tuple(n for n in names if n not in used and mesh.shape[n] > 1)
        parts = math.prod(mesh.shape[n] for n in names)
        if shape is not None and shape[dim] % parts:
            names = ()
        used.update(names)
        entries.append(names if len(names) > 1 else names[0] if names else None)
    return PartitionSpec(*entries)


def sharding_for(
    axes: Sequence[str | None], mesh: Mesh, shape: Sequence[int] | None = None
) -> NamedSharding:
    """See `partition_spec`."""
    return NamedSharding(mesh, partition_spec(axes, mesh, shape))


def replicated_dims(axes: Sequence[str | None], mesh: Mesh, shape: Sequence[int]) -> list[int]:
    """Dimensions that the rules would shard, but that their mesh axes do not divide."""
    asked, got = partition_spec(axes, mesh), partition_spec(axes, mesh, shape)
    return [dim for dim in range(len(axes)) if asked[dim] is not None and got[dim] is None]


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [B, T]."""
    return sharding_for(("batch", None), mesh)


def state_shardings(spec: Any, mesh: Mesh) -> Any:
    """A memory state's shardings, from its spec."""
    return map_spec(lambda leaf: sharding_for(leaf.axes, mesh, leaf.shape), spec)


def constrain_batch(tree: Any, mesh: Mesh) -> Any:
    """Holds the leading dimension of every leaf to the batch axes, inside jit."""
    return jax.tree.map(
        lambda leaf: jax.lax.with_sharding_constraint(
            leaf, sharding_for(("batch",) + (None,) * (leaf.ndim - 1), mesh, leaf.shape)
        ),
        tree,
    )


def kernels_over(mesh: Mesh) -> AbstractContextManager[None]:
    """While a program is traced inside, kernels run on each device's own rows and heads."""
    axes = {name: (rule,) if isinstance(rule, str) else rule for name, rule in RULES.items()}
    return partitioned(mesh, batch=axes["batch"] or (), heads=axes["heads"] or ())


def spec_shape(leaf: LeafSpec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
