"""Bytes of the training state, array by array, from shapes and the sharding table alone."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, cast

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from memtrain.config import Experiment
from memtrain.memory.protocol import is_leaf_spec
from memtrain.parallel.config import AXES, MeshConfig
from memtrain.parallel.sharding import names_of, partition_spec
from memtrain.plan.layout import tokens_of
from memtrain.train.state import Plan
from memtrain.train.tables import LazyTables


def abstract_mesh(config: MeshConfig) -> Mesh:
    """The run's mesh without devices. Shardings over it can be read, not placed."""
    sizes = config.sizes
    types = (AxisType.Auto,) * len(sizes)
    return cast(Mesh, AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=types))


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter. Bytes of the whole array, and of one device's part of it.

    gathered: bytes of what a device holds while it computes: whole but for the tensor axis.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    spec: str
    """Mesh axes of each dimension, as `PartitionSpec` prints them."""
    whole: int
    local: int
    gathered: int
    trained: bool
    is_table: bool
    on_host: bool = False
    """In host memory, as its moments are."""


@dataclasses.dataclass(frozen=True)
class Size:
    """Bytes of a part of the state: the arrays themselves, and one device's share."""

    whole: int = 0
    local: int = 0


@dataclasses.dataclass(frozen=True)
class StateSizes:
    """What lives from step to step."""

    parameters: tuple[Leaf, ...]
    optimizer: Size
    carry: Size
    tables: LazyTables
    table_moments: Mapping[str, Size] = dataclasses.field(default_factory=dict)
    """Of the optimizer's, those of each memory table."""

    def gradients(self, tokens: int) -> Size:
        """Of a step of so many tokens; tables whose gradient is of rows have none of their own."""
        by_rows = self.tables.by_rows_at(tokens)
        leaves = [leaf for leaf in self.parameters if leaf.trained and leaf.name not in by_rows]
        return Size(sum(leaf.whole for leaf in leaves), sum(leaf.local for leaf in leaves))

    def on_host(self) -> int:
        """Bytes that one device keeps in its host's memory."""
        return sum(map(self.with_moments, self._hosted()))

    def parameters_on_device(self) -> int:
        return self.total().local - sum(leaf.local for leaf in self._hosted())

    def optimizer_on_device(self) -> int:
        hosted = sum(self.with_moments(leaf) - leaf.local for leaf in self._hosted())
        return self.optimizer.local - hosted

    def with_moments(self, leaf: Leaf) -> int:
        """One device's bytes of a table and its moments."""
        return leaf.local + self.table_moments.get(leaf.name, Size()).local

    def _hosted(self) -> list[Leaf]:
        return [leaf for leaf in self.parameters if leaf.on_host]

    def total(self, *, trained_only: bool = False) -> Size:
        """Of the parameters."""
        leaves = [leaf for leaf in self.parameters if leaf.trained or not trained_only]
        return Size(sum(leaf.whole for leaf in leaves), sum(leaf.local for leaf in leaves))


def state_sizes(experiment: Experiment, vocab_size: int) -> StateSizes:
    """Raises BadInput where the parts of the experiment do not fit each other."""
    # Nothing of it depends on the length of a row, which is what searches go through.
    short = tokens_of(experiment).layout.multiple * experiment.train.tbptt_segments
    train = dataclasses.replace(experiment.train, seq_len=short)
    return _state_sizes(dataclasses.replace(experiment, train=train), vocab_size)


@functools.lru_cache(maxsize=64)
def _state_sizes(experiment: Experiment, vocab_size: int) -> StateSizes:
    mesh = abstract_mesh(experiment.mesh)
    plan = Plan.of(experiment, vocab_size, mesh)
    shapes, axes = plan.shapes(), plan.skeleton.axes()
    leaves = []
    for name in sorted(shapes.parameters):
        shape = cast(jax.ShapeDtypeStruct, shapes.parameters[name])
        spec = partition_spec(axes[name], mesh, shape.shape)
        whole = _bytes(shape.shape, shape)
        leaves.append(
            Leaf(
                name=name,
                shape=tuple(shape.shape),
                dtype=str(shape.dtype),
                axes=axes[name],
                spec=f"({', '.join('+'.join(names_of(entry)) or '-' for entry in spec)})",
                whole=whole,
                local=_local(whole, spec, mesh),
                gathered=_local(whole, spec, mesh, only=("tensor",)),
                trained=plan.groups[name] != "frozen",
                is_table=name in plan.skeleton.tables,
                on_host=plan.tables.on_host and name in plan.tables.names,
            )
        )
    carry = Size()
    if shapes.carry is not None:
        specs = jax.tree.leaves(plan.carry_spec(), is_leaf=is_leaf_spec)
        carry = Size(
            sum(leaf.nbytes for leaf in specs),
            sum(
                _local(leaf.nbytes, partition_spec(leaf.axes, mesh, leaf.shape), mesh)
                for leaf in specs
            ),
        )
    moments, of_tables = _moments(shapes.optimizer, leaves, mesh)
    return StateSizes(tuple(leaves), moments, carry, plan.tables, of_tables)


def _moments(optimizer: Any, parameters: list[Leaf], mesh: Mesh) -> tuple[Size, dict[str, Size]]:
    """Moments live with their parameter, a table's counters with its rows, others on every device
    (`train.state.Plan`). All of them, and those of each table."""
    named = {leaf.name: leaf for leaf in parameters}
    everything, of_tables = Size(), {}
    for path, moment in jax.tree_util.tree_leaves_with_path(optimizer):
        keys = (getattr(entry, "key", None) for entry in path)
        own = next((named[key] for key in keys if isinstance(key, str) and key in named), None)
        size = _bytes(moment.shape, moment)
        if own is not None and own.shape == tuple(moment.shape):
            local = size * own.local // own.whole
        elif own is not None and own.is_table and tuple(moment.shape) == own.shape[:1]:
            rows = PartitionSpec(partition_spec(own.axes, mesh, own.shape)[0])
            local = _local(size, rows, mesh)
        else:
            local = size
        everything = Size(everything.whole + size, everything.local + local)
        if own is not None and own.is_table:
            before = of_tables.get(own.name, Size())
            of_tables[own.name] = Size(before.whole + size, before.local + local)
    return everything, of_tables


def _local(nbytes: int, spec: PartitionSpec, mesh: Mesh, only: tuple[str, ...] = AXES) -> int:
    """One device's part of an array, if it is split along these mesh axes."""
    names = [name for entry in spec for name in names_of(entry) if name in only]
    return nbytes // math.prod(mesh.shape[name] for name in names)


def _bytes(shape: tuple[int, ...], like: Any) -> int:
    return math.prod(shape) * like.dtype.itemsize
