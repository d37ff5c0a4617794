"""Gradients of memory tables as the rows that were read: of all layers, rows and parts of a batch.

The table is held constant. Each layer that reads it is given a tap, zeros of the shape of what it
reads, and reports which rows it read (`memtrain.memory.table`). The gradient of a row is then the
sum of weight times the tap's gradient over all reads of it, formed once a step, in the order of
parts, layers, rows of the batch, tokens, and reads of a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from memtrain.memory.protocol import Aux, Context, TableRead
from memtrain.model.block import Taps
from memtrain.model.parameters import Skeleton
from memtrain.parallel.sharding import constrain_tokens, names_of, partition_spec
from memtrain_kernels import RowGradients, weighted_gather_row_gradients


PREFIX = "tables."
"""A table that layers call NAME is the parameter `tables.NAME`."""


@dataclasses.dataclass(frozen=True)
class ReadShape:
    """How a layer reads a table: `reads` bags of `top_k` rows for every token."""

    reads: int
    top_k: int


ReadShapes = list[dict[str, dict[str, ReadShape]]]
"""For each layer, in order of depth, {place: {table: how it is read}}."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reads:
    """All reads of one table in a step, and the gradients of what they gave.

    read: slots and weights [R, B, T, K]; d: [R, B, T, V]. R counts parts of the batch and layers; T
    counts bags.
    """

    read: TableRead
    d: Array


def read_shapes(skeleton: Skeleton) -> tuple[ReadShapes, dict[str, str]]:
    """How each layer reads the tables of the model: asked of the layers themselves, on shapes. And
    by table, why its gradient cannot be of rows, for those whose reads cannot be gathered.
    """
    config = skeleton.config
    model = skeleton.merge(skeleton.shapes)  # type: ignore[arg-type]
    tables: Any = {name: skeleton.shapes[PREFIX + name] for name in model.tables}
    length = 2
    of_pattern: ReadShapes = []
    unfit: dict[str, str] = {}
    for stacked in model.blocks:
        block = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), stacked)
        found: dict[str, dict[str, ReadShape]] = {}
        for place, memory in block.memories().items():
            if not memory.table_specs():
                continue

            def reads(memory, tables):
                x = jnp.zeros((1, length, config.dim), config.dtypes.compute)
                ctx = Context.of_documents(
                    1,
                    length,
                    tables=tables,
                    taps=dict.fromkeys(tables),
                    token_ids=jnp.zeros((1, length), jnp.int32),
                )
                return memory(x, None, ctx)[2].table_reads

            shapes = jax.eval_shape(reads, memory, tables)
            for name in memory.table_specs().keys() - shapes.keys():
                unfit[name] = (
                    f"{type(memory).__name__} does not report what it reads of it "
                    "(memtrain.memory.table.read_table does)"
                )
            found[place] = {
                name: ReadShape(read.slots.shape[1] // length, read.slots.shape[2])
                for name, read in shapes.items()
            }
        of_pattern.append(found)
    for name in tables:
        bags = {
            shapes[name].reads
            for places in of_pattern
            for shapes in places.values()
            if name in shapes
        }
        if len(bags) > 1:
            unfit[name] = "its layers make different numbers of reads a token"
    return of_pattern * config.repeats, unfit


def rows_read(shapes: ReadShapes, table: str, tokens: int) -> int:
    """The most rows of a table that a step of so many tokens reads."""
    return tokens * sum(
        shape.reads * shape.top_k
        for places in shapes
        for named in places.values()
        for name, shape in named.items()
        if name == table
    )


def taps_for(shapes: ReadShapes, tables: Mapping[str, Any], batch: int, length: int) -> list[Taps]:
    """For each layer, zeros of the shape of what it reads of these tables, by name."""

    def tap(name: str, shape: ReadShape) -> Array:
        table = tables[name]
        zeros = jnp.zeros((batch, length * shape.reads, table.shape[1]), table.dtype)
        return constrain_tokens(zeros)

    return [
        {
            place: {name: tap(name, shape) for name, shape in named.items() if name in tables}
            for place, named in places.items()
        }
        for places in shapes
    ]


def reads_of(
    aux: Sequence[Mapping[str, Aux]], d_taps: Sequence[Any], tables: Sequence[str]
) -> dict[str, Reads]:
    """By table, the reads of all layers: what one part of the batch adds."""
    found: dict[str, Reads] = {}
    for name in tables:
        of_layers = [
            (report.table_reads[name], d_taps[layer][place][name])
            for layer, places in enumerate(aux)
            for place, report in places.items()
            if name in report.table_reads
        ]
        K = max(read.slots.shape[-1] for read, _ in of_layers)

        def wide(x: Array, fill: float, K: int = K) -> Array:
            missing = K - x.shape[-1]
            return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)], constant_values=fill)

        read = TableRead(
            slots=jnp.stack([wide(read.slots, -1) for read, _ in of_layers]),
            weights=jnp.stack([wide(read.weights, 0) for read, _ in of_layers]),
        )
        found[name] = Reads(read, jnp.stack([d for _, d in of_layers]))
    return found


def row_gradients(
    reads: Reads, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh
) -> RowGradients:
    """The gradients of all rows that were read of a table of this shape, each row once.

    On a mesh, every device forms those of its own shard, for which it is given the reads of all:
    ids are of the shard, and the arrays are those of all shards, one after another.
    """
    if mesh.size == 1:
        return _sum(reads, shape[0])
    table = partition_spec(axes, mesh, shape)
    rows, columns = names_of(table[0]), names_of(table[1])
    tokens = partition_spec((None, "batch", "time", None), mesh, reads.read.slots.shape)
    batch, time = names_of(tokens[1]), names_of(tokens[2])

    def own(slots: Array, weights: Array, d: Array) -> RowGradients:
        for dim, names in ((2, time), (1, batch)):
            if names:
                slots, weights, d = (
                    jax.lax.all_gather(x, names, axis=dim, tiled=True) for x in (slots, weights, d)
                )
        size = shape[0]
        if rows:
            size //= jax.lax.axis_size(rows)
            local = slots - jax.lax.axis_index(rows) * size
            slots = jnp.where((slots >= 0) & (local >= 0) & (local < size), local, -1)
        found = _sum(Reads(TableRead(slots, weights), d), size)
        return found._replace(count=found.count[None])

    assert not set(columns) & {*batch, *time}, "no mesh axis splits both tokens and columns"
    return jax.shard_map(
        own,
        mesh=mesh,
        in_specs=(tokens, tokens, PartitionSpec(*tokens[:3], table[1])),
        out_specs=row_gradients_spec(table),
        check_vma=False,  # devices that have the same shard come to the same sums
    )(reads.read.slots, reads.read.weights, reads.d)


def row_gradients_spec(table: PartitionSpec) -> Any:
    """Of the arrays of a `RowGradients` whose table is sharded so."""
    rows = PartitionSpec(table[0])
    return RowGradients(rows, PartitionSpec(table[0], table[1]), rows)  # type: ignore[arg-type]


def _sum(reads: Reads, num_rows: int) -> RowGradients:
    flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    return weighted_gather_row_gradients(
        flat(reads.read.slots), flat(reads.read.weights), flat(reads.d), max_rows=num_rows
    )
