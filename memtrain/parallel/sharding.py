"""One table from logical axes to mesh axes, for parameters, optimizer, activations and memories."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memtrain.memory.protocol import LeafSpec, map_spec
from memtrain.parallel.tokens import WHOLE, TokenSharding
from memtrain_kernels import partitioned, tables_over
from memtrain_kernels.partition import current_partition, is_manual


RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "time": "context",
    # Parameters lie over the context axis too: its devices read the same rows, and would otherwise
    # all hold the same parameters.
    "embed": ("fsdp", "context"),
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "tensor",
    "slots": ("fsdp", "context"),  # rows of memory tables
    "value_dim": "tensor",
    "layers": None,
    "cache": "context",
    "head_dim": None,
    "key_dim": None,
    "rates": None,  # of a channel's state; what has them is not a matrix
}


def partition_spec(
    axes: Sequence[str | None], mesh: Mesh, shape: Sequence[int] | None = None
) -> PartitionSpec:
    """Mesh axes of an array with these logical axes.

    A mesh axis that does not divide its dimension, with those before it, is left out: the dimension
    is replicated over it (`replicated_dims` names them). A mesh axis serves one dimension only: the
    first that asks for it.
    """
    used: set[str] = set()
    entries: list[Any] = []
    for dim, axis in enumerate(axes):
        names: tuple[str, ...] = ()
        for name in mesh_axes(axis):
            parts = math.prod(mesh.shape[n] for n in (*names, name))
            fits = shape is None or shape[dim] % parts == 0
            if name not in used and mesh.shape[name] > 1 and fits:
                names = (*names, name)
        used.update(names)
        entries.append(names if len(names) > 1 else names[0] if names else None)
    return PartitionSpec(*entries)


def mesh_axes(axis: str | None) -> tuple[str, ...]:
    """The mesh axes of a logical axis, by the table."""
    rule = None if axis is None else RULES[axis]
    return (rule,) if isinstance(rule, str) else tuple(rule or ())


def sharding_for(
    axes: Sequence[str | None], mesh: Mesh, shape: Sequence[int] | None = None
) -> NamedSharding:
    """See `partition_spec`."""
    return NamedSharding(mesh, partition_spec(axes, mesh, shape))


def replicated_dims(axes: Sequence[str | None], mesh: Mesh, shape: Sequence[int]) -> list[int]:
    """Dimensions that the rules would shard more, but that their mesh axes do not divide."""
    asked, got = partition_spec(axes, mesh), partition_spec(axes, mesh, shape)
    lost = (set(names_of(a)) - set(names_of(g)) for a, g in zip(asked, got, strict=True))
    return [dim for dim, names in enumerate(lost) if names]


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [B, T]."""
    return sharding_for(("batch", None), mesh)


def state_shardings(spec: Any, mesh: Mesh) -> Any:
    """A memory state's shardings, from its spec."""
    return map_spec(lambda leaf: sharding_for(leaf.axes, mesh, leaf.shape), spec)


@dataclass(frozen=True)
class Split:
    """How activations and the head lie on the mesh of the program that is being traced."""

    mesh: Mesh

    def tokens(self, shape: Sequence[int]) -> PartitionSpec:
        """Of activations [B, T, ...]."""
        axes = ("batch", "time") + (None,) * (len(shape) - 2)
        return partition_spec(axes, self.mesh, shape)

    def vocabulary(self, shape: Sequence[int]) -> PartitionSpec:
        """Of the head [V, D], gathered along D."""
        return PartitionSpec(partition_spec(("vocab", None), self.mesh, shape)[0], None)

    def gathered(self, axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
        """Of a parameter with these logical axes as it is used: gathered along the model's width,
        over whose parts it is only stored."""
        kept = [None if axis == "embed" else axis for axis in axes]
        return partition_spec(kept, self.mesh, shape)


def split_here() -> Split | None:
    """The split under `kernels_over`; None outside, on one device, and inside `jax.shard_map`."""
    part = current_partition()
    if part is None or part.mesh.size == 1 or is_manual():
        return None
    return Split(cast(Mesh, part.mesh))


def names_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def constrain_tokens(x: jax.Array) -> jax.Array:
    """Activations [B, T, ...] held to their rows and tokens, under `kernels_over`; else as is."""
    split = split_here()
    if split is None:
        return x
    sharding = NamedSharding(split.mesh, split.tokens(x.shape))
    return jax.lax.with_sharding_constraint(x, sharding)


@contextlib.contextmanager
def kernels_over(mesh: Mesh, tokens: TokenSharding = WHOLE) -> Iterator[None]:
    """While a program is traced inside, kernels run on each device's own rows, heads and tokens."""
    with (
        partitioned(
            mesh,
            batch=mesh_axes("batch"),
            heads=mesh_axes("heads"),
            sequence="context",
            layout=tokens.layout.kind,
            strategy=tokens.strategy,
            ulysses=tokens.ulysses,
        ),
        tables_over(rows=mesh_axes("slots"), columns=mesh_axes("value_dim")),
    ):
        yield


def spec_shape(leaf: LeafSpec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
