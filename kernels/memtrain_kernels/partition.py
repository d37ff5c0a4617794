"""Kernels under automatic sharding: each device runs them on its own rows, heads and tokens.

XLA cannot look into a kernel, so it cannot split one over the devices of a mesh as it splits its
own operations: on GPU it would gather every operand, on TPU it refuses. Attention needs nothing of
other rows or heads, so a call is put under `jax.shard_map` where the program says how it is
sharded.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec


@dataclass(frozen=True)
class Partition:
    """The mesh of a program, and which of its axes split rows, heads and tokens; the rest as
    `context_attention` has it."""

    mesh: Mesh | AbstractMesh
    batch: tuple[str, ...]
    heads: tuple[str, ...]
    sequence: str | None = None
    layout: str = "contiguous"
    strategy: str = "ring"
    ulysses: int | None = None

    @property
    def splits_tokens(self) -> bool:
        return self.sequence is not None and self.mesh.shape[self.sequence] > 1

    def axes(self, names: tuple[str, ...], *sizes: int) -> tuple[str, ...] | None:
        """The axes of these that together divide every one of the sizes, in order; None if none."""
        kept: list[str] = []
        for name in names:
            parts = math.prod(self.mesh.shape[n] for n in (*kept, name))
            if self.mesh.shape[name] > 1 and all(size % parts == 0 for size in sizes):
                kept.append(name)
        return tuple(kept) or None


# Part of the key under which jit keeps programs: another partition is another program.
_partition = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def partitioned(
    mesh: Mesh | AbstractMesh,
    *,
    batch: tuple[str, ...] = (),
    heads: tuple[str, ...] = (),
    sequence: str | None = None,
    layout: str = "contiguous",
    strategy: str = "ring",
    ulysses: int | None = None,
) -> Iterator[None]:
    """While a program is traced inside, kernels run on each device's own rows, heads and tokens.

    batch, heads, sequence: the mesh axes over which the rows, the heads and the tokens of
    activations are sharded. Axes that do not divide a call's rows or heads, and one whose layout
    cannot split its tokens, are left out of that call, whose operands are then gathered over them.

    layout, strategy, ulysses: of the tokens over `sequence`, as `context_attention` takes them:
    `attention` is that function then. Arrays have their tokens in the layout's device order.
    """
    split = (*batch, *heads, *((sequence,) if sequence else ()))
    for name in split:
        if name not in mesh.shape:
            raise ValueError(f"mesh axis {name!r}: the mesh has {', '.join(mesh.shape)}")
        if split.count(name) > 1:
            raise ValueError(
                f"mesh axis {name!r} splits several of rows, heads and tokens: give it once"
            )
    part = Partition(mesh, tuple(batch), tuple(heads), sequence, layout, strategy, ulysses)
    with _partition(part):
        yield


def current_partition() -> Partition | None:
    """What `partitioned` says, for kernels that are split in a way of their own."""
    return _partition.value


def is_told() -> bool:
    """Whether a kernel traced here runs on one device's share: there is but one device, the program
    said how it is sharded, or this is inside `jax.shard_map` already."""
    return jax.device_count() == 1 or _partition.value is not None or is_manual()


def is_manual() -> bool:
    """Whether this is inside a shard_map over every axis of its mesh that has several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = set(mesh.manual_axes)
    return bool(manual) and all(mesh.shape[n] == 1 or n in manual for n in mesh.axis_names)


def region(part: Partition) -> tuple[dict[str, Any], set[str]]:
    """What `jax.shard_map` takes to open over the partition's mesh, and the axes that are manual
    already: inside a shard_map over some axes only, what is left to split is split over the rest.
    """
    outer = set(jax.sharding.get_abstract_mesh().manual_axes)
    if outer:
        return {"axis_names": set(part.mesh.axis_names) - outer}, outer
    return {"mesh": part.mesh}, outer


def over_devices(attend: Callable[..., Any]) -> Callable[..., Any]:
    """attend(q, k, v, q_pos, kv_pos, q_seg, kv_seg, spec) on each device's rows and heads."""
    found = _partition.value
    if found is None or found.mesh.size == 1 or is_manual():
        return attend
    part: Partition = found
    inner, outer = region(part)

    def split(q, k, v, q_pos, kv_pos, q_seg, kv_seg, spec):
        rows_over, heads_over = (
            tuple(n for n in names if n not in outer) for names in (part.batch, part.heads)
        )
        batch = part.axes(rows_over, q.shape[0])
        H, K = q.shape[2], k.shape[2]
        kv_heads = None if K == 1 else part.axes(heads_over, H, K)
        heads = part.axes(heads_over, H) if K == 1 else kv_heads  # one key head serves them all
        queries, keys = (PartitionSpec(batch, None, h, None) for h in (heads, kv_heads))
        tokens = (q_pos, kv_pos, q_seg, kv_seg)
        rows = [
            None if x is None else PartitionSpec(batch if x.shape[0] > 1 else None, None)
            for x in tokens
        ]
        return jax.shard_map(
            lambda q, k, v, *tokens: attend(q, k, v, *tokens, spec),
            **inner,
            in_specs=(queries, keys, keys, *rows),
            out_specs=(queries, PartitionSpec(batch, None, heads)),
            check_vma=False,  # kernels say nothing of how their outputs vary
        )(q, k, v, *tokens)

    return split
