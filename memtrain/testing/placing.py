"""Arguments of a memory's call, laid over a mesh by the one table of rules, as a run holds them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from memtrain.memory.protocol import Context, Memory
from memtrain.parallel.config import MeshConfig
from memtrain.parallel.mesh import mesh_of
from memtrain.parallel.sharding import sharding_for, state_shardings
from memtrain.testing.report import Outcome
from memtrain_kernels import Layout


DEVICES = 8
"""What the laws over devices are checked on."""

MeshSizes = tuple[int, int, int, int]
"""(data, fsdp, context, tensor)."""

NAMES = ("data", "fsdp", "context", "tensor")


def mesh_of_sizes(sizes: MeshSizes) -> Mesh:
    return mesh_of(MeshConfig(**dict(zip(NAMES, sizes, strict=True))))


def described(sizes: MeshSizes) -> str:
    """data=2 x context=4: the axes that have several devices."""
    parts = [f"{n}={s}" for n, s in zip(NAMES, sizes, strict=True) if s > 1]
    return " x ".join(parts) or "one device"


def factorisations(devices: int) -> list[MeshSizes]:
    """Every mesh of so many devices."""
    divisors = [d for d in range(1, devices + 1) if devices % d == 0]
    return [
        (d, f, c, devices // (d * f * c))
        for d in divisors
        for f in divisors
        for c in divisors
        if devices % math.prod((d, f, c)) == 0
    ]


def too_few_devices(outcome: Outcome) -> bool:
    """Whether the law cannot be checked here; the outcome then says so."""
    found = len(jax.devices())
    if found >= DEVICES:
        return False
    outcome.status = "not checked"
    outcome.notes.append(
        f"{found} devices: the law needs {DEVICES}, for instance by "
        f"jax.config.update('jax_num_cpu_devices', {DEVICES}) before JAX starts"
    )
    return True


@dataclasses.dataclass(frozen=True)
class Placing:
    """A mesh, and the order of the tokens over it."""

    mesh: Mesh
    layout: Layout

    def tokens(self, leaf: Any) -> jax.Array:
        """[B, T, ...] in natural order, to device order and its devices."""
        axes = ("batch", "time") + (None,) * (leaf.ndim - 2)
        return self._put(axes, self.layout.arrange(leaf))

    def context(self, ctx: Context) -> Context:
        arranged = jax.tree.map(self.tokens, dataclasses.replace(ctx, tables={}))
        return dataclasses.replace(arranged, layout=self.layout)

    def state(self, spec: Any, state: Any) -> Any:
        return jax.device_put(jax.device_get(state), state_shardings(spec, self.mesh))

    def tables(self, tables: dict[str, Any]) -> dict[str, jax.Array]:
        return {name: self._put(("slots", "value_dim"), table) for name, table in tables.items()}

    def module(self, memory: Memory) -> Memory:
        is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
        variables, structure = jax.tree.flatten(memory, is_leaf=is_variable)
        placed = []
        for variable in variables:
            leaf = variable[...]
            axes = variable.get_metadata().get("logical_axes") or (None,) * leaf.ndim
            placed.append(variable.replace(self._put(axes, leaf)))
        return jax.tree.unflatten(structure, placed)

    def _put(self, axes: tuple[str | None, ...], leaf: Any) -> jax.Array:
        # From the host: to cut an array of a device is a program for every shape.
        return jax.device_put(jax.device_get(leaf), sharding_for(axes, self.mesh, leaf.shape))
