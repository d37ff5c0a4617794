"""What a training run is at one step, and where each part of it lives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, UInt32

from memtrain.config import Experiment
from memtrain.errors import BadInput
from memtrain.model.language_model import full_pattern
from memtrain.model.parameters import Parameters, Skeleton, match_names
from memtrain.parallel.sharding import replicated, state_shardings
from memtrain.parallel.tokens import WHOLE, TokenSharding
from memtrain.train.optimizer import groups_of, optimizer_of
from memtrain.train.tables import LazyTables, OptimizerState


CARRY_CAPACITY = 2**30
"""Tokens that a carried state must be able to take in: without end, for all practical purposes."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a checkpoint holds, and that a step takes and gives back.

    step: updates tried. skipped: those left out for a non-finite loss or gradient, in all;
    skipped_in_row: since the last good one. carry: the memories' state, or None. rng: key data.
    """

    step: Int[Array, ""]
    parameters: Parameters
    optimizer: Any
    carry: Any
    rng: UInt32[Array, "key"]
    skipped: Int[Array, ""]
    skipped_in_row: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The fixed parts of a run: the model's skeleton, its optimizer, its mesh, its groups.

    optimizer: of all but `tables`, which are updated lazily."""

    experiment: Experiment
    skeleton: Skeleton
    mesh: Mesh
    optimizer: optax.GradientTransformation
    groups: Mapping[str, str]
    tables: LazyTables
    tokens: TokenSharding = WHOLE

    @classmethod
    def of(cls, experiment: Experiment, vocab_size: int, mesh: Mesh) -> Plan:
        """Raises BadInput where the parts do not fit each other."""
        skeleton = Skeleton.of(experiment.model, vocab_size)
        names = sorted(skeleton.shapes)
        frozen = match_names(experiment.train.freeze, names, "train.freeze") | skeleton.statistics
        if experiment.train.edit is not None:
            frozen |= set(names) - skeleton.tables
        groups = groups_of(skeleton.shapes, skeleton.tables, frozen)
        tables = LazyTables.of(
            experiment, skeleton, mesh, {n for n, group in groups.items() if group == "table"}
        )
        optimizer = optimizer_of(
            experiment.optimizer,
            experiment.train.num_steps,
            {n: group for n, group in groups.items() if n not in tables.names},
            skeleton.axes(),
        )
        layers = [
            layer
            for block in full_pattern(experiment.model)
            for layer in (block.mixer, block.ffn)
            if layer is not None
        ]
        # A plan's mesh may have no devices.
        kind = mesh.devices.flat[0].device_kind if isinstance(mesh, Mesh) else ""
        tokens = TokenSharding.of(experiment.mesh, layers, experiment.train.seq_len, kind)
        plan = cls(experiment, skeleton, mesh, optimizer, groups, tables, tokens)
        if experiment.train.carry != "none":
            plan.carry_spec()
        return plan

    def parameter_shardings(self) -> dict[str, NamedSharding]:
        """Where each parameter lives."""
        found = self.skeleton.shardings(self.mesh)
        return found | {name: self._of_table(found[name]) for name in self.tables.names}

    def _of_table(self, sharding: NamedSharding) -> NamedSharding:
        return sharding.with_memory_kind("pinned_host") if self.tables.on_host else sharding

    def group(self, name: str) -> set[str]:
        return {n for n, group in self.groups.items() if group == name}

    def carry_spec(self) -> Any:
        """Spec of the state between steps. A stream has no end, so every leaf must be of fixed
        size.
        """
        from memtrain.memory.protocol import is_leaf_spec

        model = self.skeleton.merge(self.skeleton.shapes)  # type: ignore[arg-type]
        spec = model.state_spec(self.experiment.train.batch_size, CARRY_CAPACITY)
        flat, _ = jax.tree_util.tree_flatten_with_path(spec, is_leaf=is_leaf_spec)
        growing = [path for path, leaf in flat if leaf.growth != "fixed"]
        if growing:
            layer, place = growing[0][0].idx, growing[0][1].key
            raise BadInput(
                f'train.carry="{self.experiment.train.carry}": the memory of layer {layer} '
                f"({place}) grows with every token and cannot be carried without end; give it a "
                'window, or set train.carry="none"'
            )
        return spec

    def init(self) -> TrainState:
        """The state at step 0, each array made where it will live."""
        seed, shardings = self.experiment.train.seed, self.shardings()
        places: Any = shardings.parameters
        if not self.tables.on_host:
            return jax.jit(self._init, out_shardings=shardings)(jax.random.key(seed))

        def rest(state: Any) -> Any:
            return dataclasses.replace(
                state,
                parameters=self.without_lazy(state.parameters),
                optimizer=state.optimizer.main,
            )

        made = jax.jit(lambda key: rest(self._init(key)), out_shardings=rest(shardings))
        state = made(jax.random.key(seed))
        # Tables are drawn by the host's own processor: a device may have no room for one.
        with jax.default_device(_processor()):
            drawn = jax.jit(lambda key: self._draw_tables(key))(jax.random.key(seed))
            drawn = {name: np.asarray(table) for name, table in drawn.items()}
        tables: Parameters = {
            name: jax.make_array_from_callback(table.shape, places[name], lambda at, t=table: t[at])
            for name, table in drawn.items()
        }
        moments = self.tables.init_on_host(tables, shardings.optimizer.tables)
        return dataclasses.replace(
            state,
            parameters=state.parameters | tables,
            optimizer=OptimizerState(state.optimizer, moments),
        )

    def _draw_tables(self, key: Array) -> Parameters:
        parameters = self.skeleton.init(jax.random.split(key)[0])
        return {name: parameters[name] for name in self.tables.names}

    def _init(self, key: Array) -> TrainState:
        model_key, run_key = jax.random.split(key)
        parameters = self.skeleton.init(model_key)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            parameters=parameters,
            optimizer=self.init_optimizer(parameters),
            carry=self._empty_carry(parameters),
            rng=jax.random.key_data(run_key),
            skipped=jnp.zeros((), jnp.int32),
            skipped_in_row=jnp.zeros((), jnp.int32),
        )

    def init_optimizer(self, parameters: Parameters) -> Any:
        """The optimizer's state before the first step."""
        main = self.optimizer.init(self.without_lazy(parameters))
        if not self.tables.names:
            return main
        return OptimizerState(main, self.tables.init(parameters))

    def placed_optimizer(self, parameters: Parameters) -> Any:
        """`init_optimizer`, each array made where it will live."""
        shardings = self.shardings().optimizer
        if not self.tables.on_host:
            return jax.jit(self.init_optimizer, out_shardings=shardings)(parameters)
        main = jax.jit(self.optimizer.init, out_shardings=shardings.main)(
            self.without_lazy(parameters)
        )
        return OptimizerState(main, self.tables.init_on_host(parameters, shardings.tables))

    def without_lazy(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """What is optax's, of leaves by parameter name."""
        return {name: leaf for name, leaf in leaves.items() if name not in self.tables.names}

    def _empty_carry(self, parameters: Parameters) -> Any:
        if self.experiment.train.carry == "none":
            return None
        model = self.skeleton.merge(parameters)
        return model.init_state(self.experiment.train.batch_size, CARRY_CAPACITY)

    def empty_carry(self, parameters: Parameters) -> Any:
        """The memories' state before anything was read; None where none is carried."""
        if self.experiment.train.carry == "none":
            return None
        return jax.jit(self._empty_carry, out_shardings=self.shardings().carry)(parameters)

    def shapes(self) -> TrainState:
        """Shapes and dtypes of the state, before anything is allocated."""
        return jax.eval_shape(self._init, jax.random.key(0))

    def shardings(self) -> TrainState:
        """Where each array of the state lives. Optimizer moments live with their parameter."""
        shapes, mesh = self.shapes(), self.mesh
        parameters: Any = self.parameter_shardings()
        everywhere: Any = replicated(mesh)

        def of_moment(path, leaf):
            for entry in path:
                name = getattr(entry, "key", None)
                if not isinstance(name, str) or name not in parameters:
                    continue
                if leaf.shape == shapes.parameters[name].shape:
                    return parameters[name]
                if name in self.tables.names:  # a number of each row
                    rows = PartitionSpec(self.tables.spec(name)[0])
                    return self._of_table(NamedSharding(mesh, rows))
            return everywhere

        carry = None
        if shapes.carry is not None:
            carry = state_shardings(self.carry_spec(), mesh)
        return TrainState(
            step=everywhere,
            parameters=parameters,
            optimizer=jax.tree_util.tree_map_with_path(of_moment, shapes.optimizer),
            carry=carry,
            rng=everywhere,
            skipped=everywhere,
            skipped_in_row=everywhere,
        )

    def abstract(self) -> TrainState:
        """Shapes with shardings: what a checkpoint is restored into."""
        return jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
            self.shapes(),
            self.shardings(),
        )


def _processor() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise BadInput(
            "mesh.table_memory=host: tables are drawn by the host's processor, which JAX was not "
            f"given (JAX_PLATFORMS; add ',cpu' to it): {error}"
        ) from None
