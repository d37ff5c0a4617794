"""Kernels under automatic sharding: each device runs them on its own rows and heads.

XLA cannot look into a kernel, so it cannot split one over the devices of a mesh as it splits its
own operations: on GPU it would gather every operand, on TPU it refuses. Attention needs nothing of
other rows or heads, so a call is put under `jax.shard_map` where the program says how it is
sharded.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec


@dataclass(frozen=True)
class Partition:
    """The mesh of a program, and which of its axes split rows and heads."""

    mesh: Mesh | AbstractMesh
    batch: tuple[str, ...]
    heads: tuple[str, ...]

    def axes(self, names: tuple[str, ...], *sizes: int) -> tuple[str, ...] | None:
        """The axes of these that together divide every one of the sizes, in order; None if none."""
        kept: list[str] = []
        for name in names:
            parts = math.prod(self.mesh.shape[n] for n in (*kept, name))
            if self.mesh.shape[name] > 1 and all(size % parts == 0 for size in sizes):
                kept.append(name)
        return tuple(kept) or None


_partition: contextvars.ContextVar[Partition | None] = contextvars.ContextVar(
    "partition", default=None
)


@contextlib.contextmanager
def partitioned(
    mesh: Mesh | AbstractMesh, *, batch: tuple[str, ...] = (), heads: tuple[str, ...] = ()
) -> Iterator[None]:
    """While a program is traced inside, kernels run on each device's own rows and heads.

    batch, heads: the mesh axes over which the rows and the heads of activations are sharded. Axes
    that do not divide a call's rows or heads are left out of that call, whose operands are then
    gathered over them.
    """
    token = _partition.set(Partition(mesh, tuple(batch), tuple(heads)))
    try:
        yield
    finally:
        _partition.reset(token)


def current_partition() -> Partition | None:
    return _partition.get()


def is_told() -> bool:
    """Whether a kernel traced here runs on one device's share: there is but one device, the program
    said how it is sharded, or this is inside `jax.shard_map` already."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return jax.device_count() == 1 or _partition.get() is not None or bool(manual)


def over_devices(attend: Callable[..., Any]) -> Callable[..., Any]:
    """attend(q, k, v, q_pos, kv_pos, q_seg, kv_seg, spec) on each device's rows and heads."""
    found = _partition.get()
    if found is None or found.mesh.size == 1 or jax.sharding.get_abstract_mesh().manual_axes:
        return attend
    part = found

    def split(q, k, v, q_pos, kv_pos, q_seg, kv_seg, spec):
        batch = part.axes(part.batch, q.shape[0])
        H, K = q.shape[2], k.shape[2]
        kv_heads = None if K == 1 else part.axes(part.heads, H, K)
        heads = part.axes(part.heads, H) if K == 1 else kv_heads  # one key head serves them all
        queries, keys = (PartitionSpec(batch, None, h, None) for h in (heads, kv_heads))
        tokens = (q_pos, kv_pos, q_seg, kv_seg)
        rows = [
            None if x is None else PartitionSpec(batch if x.shape[0] > 1 else None, None)
            for x in tokens
        ]
        return jax.shard_map(
            lambda q, k, v, *tokens: attend(q, k, v, *tokens, spec),
            mesh=part.mesh,
            in_specs=(queries, keys, keys, *rows),
            out_specs=(queries, PartitionSpec(batch, None, heads)),
            check_vma=False,  # kernels say nothing of how their outputs vary
        )(q, k, v, *tokens)

    return split
