"""Memory tables in a train step: which gradient each is given, and its lazy update."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec, SingleDeviceSharding
from jaxtyping import Array

from memtrain.config import Experiment
from memtrain.errors import BadInput
from memtrain.model.parameters import Parameters, Skeleton
from memtrain.parallel.sharding import names_of, partition_spec
from memtrain.train.row_adam import Now, RowAdam, Shard, TableMoments
from memtrain.train.table_gradients import (
    PREFIX,
    Reads,
    ReadShapes,
    read_shapes,
    row_gradients,
    row_gradients_spec,
    rows_read,
)
from memtrain_kernels import RowGradients, rows_of


class OptimizerState(NamedTuple):
    """Of a model with lazily updated tables: optax's, and by parameter that of each table."""

    main: Any
    tables: dict[str, TableMoments]


@dataclasses.dataclass(frozen=True)
class LazyTables:
    """The tables that are updated lazily, by parameter name.

    by_rows: those of them whose gradient is of the rows that were read. shapes: how layers read;
    empty where gradients are tables by choice. always: rows by choice. unfit: never.
    """

    skeleton: Skeleton
    mesh: Any  # a Mesh, or an AbstractMesh for a plan
    adam: RowAdam
    names: tuple[str, ...] = ()
    by_rows: frozenset[str] = frozenset()
    shapes: ReadShapes = dataclasses.field(default_factory=list)
    always: bool = False
    unfit: frozenset[str] = frozenset()
    why: tuple[str, ...] = ()
    """Of tables whose gradient is a table for want of something, what that is."""
    on_host: bool = False
    """Whether they and their moments live in host memory."""

    @classmethod
    def of(
        cls, experiment: Experiment, skeleton: Skeleton, mesh: Any, trained: set[str]
    ) -> LazyTables:
        """trained: the trained tables. Raises BadInput for what they cannot be given."""
        config, train = experiment.optimizer, experiment.train
        adam = RowAdam(
            config.beta1,
            config.beta2,
            config.epsilon,
            config.table_rounding,
            chosen_rows=train.edit is not None,
        )
        on_host = experiment.mesh.table_memory == "host"
        if on_host and (config.table_update == "dense" or config.table_gradient == "dense"):
            key = "table_update" if config.table_update == "dense" else "table_gradient"
            raise BadInput(
                f"mesh.table_memory=host: optimizer.{key}=dense would bring the whole table to the "
                "devices at every step; leave it out"
            )
        if on_host and not trained:
            raise BadInput(
                "mesh.table_memory=host: no memory table is trained; those that are frozen stay on "
                "the devices, so leave it out"
            )
        if config.table_update == "dense" or not trained:
            return cls(skeleton, mesh, adam)
        names = tuple(sorted(trained))
        narrow = [name for name in names if skeleton.shapes[name].dtype == jnp.bfloat16]
        if config.table_rounding != "nearest" and not narrow:
            raise BadInput(
                f"optimizer.table_rounding={config.table_rounding}: the tables are float32 and not "
                "rounded; set model.dtypes.tables=bfloat16, or leave it out"
            )
        found = cls(skeleton, mesh, adam, names, on_host=on_host)
        if config.table_gradient == "dense":
            return found
        shapes, unfit = read_shapes(skeleton)
        why = []
        for name in names:
            table = name.removeprefix(PREFIX)
            if table in unfit and (on_host or config.table_gradient == "rows"):
                key = "mesh.table_memory=host" if on_host else "optimizer.table_gradient=rows"
                raise BadInput(f"{key}: table {table!r}: {unfit[table]}")
            if table in unfit:
                why.append(f"table {table!r} gets a gradient of its size: {unfit[table]}")
        found = dataclasses.replace(
            found,
            shapes=shapes,
            always=on_host or config.table_gradient == "rows",
            unfit=frozenset(PREFIX + table for table in unfit),
            why=tuple(why),
        )
        by_rows = found.by_rows_at(train.batch_size * train.seq_len)
        return dataclasses.replace(found, by_rows=by_rows)

    def by_rows_at(self, tokens: int) -> frozenset[str]:
        """What `by_rows` is of a step of so many tokens."""
        if not self.shapes:
            return frozenset()
        return frozenset(
            name
            for name in self.names
            if name not in self.unfit
            and (self.always or self.rows_read(name, tokens) < self.local_rows(name))
        )

    def rows_read(self, name: str, tokens: int) -> int:
        """The most rows of a table that a step of so many tokens reads."""
        return rows_read(self.shapes, name.removeprefix(PREFIX), tokens)

    def spec(self, name: str) -> PartitionSpec:
        """How a table lies on the mesh."""
        shape = self.skeleton.shapes[name].shape
        return partition_spec(self.skeleton.axes()[name], self.mesh, shape)

    def local_rows(self, name: str) -> int:
        """Rows of a table that one device has."""
        parts = math.prod(self.mesh.shape[axis] for axis in names_of(self.spec(name)[0]))
        return self.skeleton.shapes[name].shape[0] // parts

    def init(self, parameters: Parameters) -> dict[str, TableMoments]:
        return {name: self.adam.init(parameters[name]) for name in self.names}

    def init_on_host(
        self, parameters: Parameters, shardings: Mapping[str, TableMoments]
    ) -> dict[str, TableMoments]:
        """`init` of tables in host memory, shard by shard, without any on a device."""

        def made(table: Array, shape: Any, sharding: Any, fill: int) -> Array:
            return jax.make_array_from_callback(
                shape.shape,
                sharding,
                lambda at: np.full(sharding.shard_shape(shape.shape), fill, shape.dtype),
            )

        found = {}
        for name in self.names:
            table, places = parameters[name], shardings[name]
            shapes = jax.eval_shape(self.adam.init, table)
            arrays = {
                field: made(table, shape, getattr(places, field), -1 if field == "last_step" else 0)
                for field, shape in shapes._asdict().items()
                if shape is not None and field != "master"
            }
            if shapes.master is not None:
                parts = [
                    jax.device_put(
                        np.asarray(shard.data, np.float32),
                        SingleDeviceSharding(shard.device, memory_kind="pinned_host"),
                    )
                    for shard in table.addressable_shards
                ]
                place: Any = places.master
                arrays["master"] = jax.make_array_from_single_device_arrays(
                    table.shape, place, parts
                )
            found[name] = TableMoments(**arrays)
        return found

    def moments_specs(self, moments: TableMoments, name: str) -> TableMoments:
        """A PartitionSpec for each array of a table's moments."""
        rows, columns = self.spec(name)
        return jax.tree.map(
            lambda a: PartitionSpec(rows, columns) if a.ndim == 2 else PartitionSpec(rows), moments
        )

    def gradients(self, reads: Mapping[str, Reads]) -> dict[str, RowGradients]:
        """By parameter, the gradients of the tables of which the rows that were read are known."""
        shapes, axes = self.skeleton.shapes, self.skeleton.axes()
        return {
            PREFIX + name: row_gradients(
                found, shapes[PREFIX + name].shape, axes[PREFIX + name], self.mesh
            )
            for name, found in reads.items()
        }

    def writable(
        self, gradients: Mapping[str, Any], moments: Mapping[str, TableMoments]
    ) -> dict[str, Any]:
        """Gradients of tables, zero for rows that may not be written: they count nowhere."""
        if not self.adam.chosen_rows:
            return dict(gradients)
        return {
            name: self._writable(name, gradient, moments[name].writable)
            for name, gradient in gradients.items()
        }

    def _writable(self, name: str, gradient: Any, mask: Array | None) -> Any:
        assert mask is not None
        if name not in self.by_rows:
            return gradient * jax.device_put(mask, jax.memory.Space.Device)[:, None]

        def own(ids: Array, rows: Array, mask: Array) -> Array:
            return rows * rows_of(mask, jnp.minimum(ids, mask.shape[0] - 1))[:, None]

        if self.mesh.size == 1:
            rows = own(gradient.ids, gradient.rows, mask)
        else:
            spec = self.spec(name)
            whole, of_rows = PartitionSpec(*spec), PartitionSpec(spec[0])
            rows = jax.shard_map(
                own,
                mesh=self.mesh,
                in_specs=(of_rows, whole, of_rows),
                out_specs=whole,
                check_vma=False,
            )(gradient.ids, gradient.rows, mask)
        return gradient._replace(rows=rows)

    def update(
        self,
        parameters: Parameters,
        moments: Mapping[str, TableMoments],
        gradients: Mapping[str, Any],
        now: Now,
    ) -> tuple[Parameters, dict[str, TableMoments]]:
        """The tables and their moments after a step. gradients: scaled and clipped."""
        tables, after = {}, {}
        for name in self.names:
            given = (parameters[name], moments[name], gradients[name], now)
            if name in self.by_rows:
                tables[name], after[name] = self._by_rows(name, *given)
            else:
                tables[name], after[name] = self.adam.update_table(*given)
        return tables, after

    def _by_rows(
        self, name: str, table: Array, moments: TableMoments, gradients: RowGradients, now: Now
    ):
        if self.mesh.size == 1:
            return self.adam.update_rows(table, moments, gradients, now)
        spec = self.spec(name)
        rows, columns = names_of(spec[0]), names_of(spec[1])

        def own(table, moments, gradients, now):
            shard = Shard(
                first_row=jax.lax.axis_index(rows) * table.shape[0] if rows else 0,
                first_column=jax.lax.axis_index(columns) * table.shape[1] if columns else 0,
                over_columns=columns,
            )
            return self.adam.update_rows(table, moments, gradients, now, shard)

        specs = (spec, self.moments_specs(moments, name))
        return jax.shard_map(
            own,
            mesh=self.mesh,
            in_specs=(*specs, row_gradients_spec(spec), Now(*[PartitionSpec()] * 4)),  # type: ignore[arg-type]
            out_specs=specs,
            check_vma=False,
        )(table, moments, gradients, now)


IDLE_STEPS = 1000
"""A row that was not updated in so many steps counts as idle."""


@jax.jit
def usage(tables: Mapping[str, TableMoments], step: Array | int) -> dict[str, Array]:
    """Shares of each table's rows, of those that may be written, by metric: `never_updated`, and
    `idle` for more than `IDLE_STEPS` steps (0 before there were so many).

    tables: by parameter, after `step` steps.
    """
    found = {}
    for name, moments in tables.items():
        # Two numbers a row: of all that may be in host memory, they are brought here.
        updates, last_step, of = jax.device_put(
            (moments.updates, moments.last_step, moments.writable), jax.memory.Space.Device
        )
        found[f"memory/{name}.never_updated"] = jnp.mean(updates == 0, where=of)
        found[f"memory/{name}.idle"] = jnp.mean(last_step < step - IDLE_STEPS, where=of)
    return found


def scaled(gradient: Any, scale: Array) -> Any:
    """A gradient, a table or rows of one, times a number."""
    if isinstance(gradient, RowGradients):
        return gradient._replace(rows=gradient.rows * scale)
    return gradient * scale
