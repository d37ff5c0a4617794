"""Law 6: on any mesh of 8 devices, the results of one: outputs, state and gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from memtrain.parallel.config import MeshConfig
from memtrain.parallel.mesh import mesh_of
from memtrain.parallel.sharding import sharding_for, state_shardings
from memtrain.testing.bench import Bench
from memtrain.testing.cases import BATCH, halves
from memtrain.testing.report import Outcome
from memtrain.testing.subject import Subject
from memtrain.testing.tolerances import Judge


COVERING = ((8, 1), (4, 2), (2, 4), (1, 8), (2, 1), (1, 2))
"""(data, fsdp): every axis alone and both together, all devices and a part of them."""

ALL = tuple((d, f) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if d * f <= 8)


def check(bench: Bench) -> Outcome:
    judge = Judge("sharding")
    devices = len(jax.devices())
    meshes = [m for m in (ALL if bench.slow else COVERING) if m[0] * m[1] <= devices]
    if devices < 8:
        judge.outcome.status = "not checked"
        judge.outcome.notes.append(
            f"{devices} devices: the law needs 8, for instance by "
            "jax.config.update('jax_num_cpu_devices', 8) before JAX starts"
        )
        return judge.outcome
    subject = bench.subject()
    program, arguments = _program(subject), _arguments(subject)
    want = program(*arguments)
    valid = subject.layout.valid[:, halves(bench.length)[0] :]
    for data, fsdp in meshes:
        mesh = mesh_of(MeshConfig(data=data, fsdp=fsdp))
        case = f"mesh data={data} x fsdp={fsdp}"
        outputs, state, gradients = program(*_placed(subject, arguments, mesh))
        # Padding's outputs are nobody's: they need not even be the same twice.
        judge.close(case, outputs, want[0], where=valid)
        judge.close(case + ", final state", subject.live(state), subject.live(want[1]))
        judge.close(case, gradients, want[2], kind="gradient")
    judge.outcome.notes.append(f"{len(meshes)} meshes")
    return judge.outcome


def _program(subject: Subject) -> Any:
    """One call with a carried state, forward and backward."""

    def loss(memory, x, tables, state, ctx, w):
        y, state, _ = memory(x, state, dataclasses.replace(ctx, tables=tables))
        return jnp.sum(y * w), (y, state)

    gradient = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True, allow_int=True)

    def program(*arguments):
        gradients, (y, state) = gradient(*arguments)
        names = ("parameters", "input", "tables", "state")
        return y, state, dict(zip(names, gradients, strict=True))

    return subject.jit(program)


def _arguments(subject: Subject) -> tuple:
    first, second = halves(subject.length)
    x, ctx, w = subject.x, subject.ctx, subject.cotangent
    _, state = subject.run((first,), x[:, :first], ctx.window(0, first))
    ctx = dataclasses.replace(ctx.window(first, first + second), tables={})
    return subject.memory, x[:, first:], subject.tables, state, ctx, w[:, first:]


def _placed(subject: Subject, arguments: tuple, mesh: Mesh) -> tuple:
    """The arguments as a run on this mesh holds them, by the one table of rules."""
    memory, x, tables, state, ctx, w = arguments
    put = lambda axes, leaf: jax.device_put(leaf, sharding_for(axes, mesh, leaf.shape))  # noqa: E731
    rows = lambda leaf: put(("batch",) + (None,) * (leaf.ndim - 1), leaf)  # noqa: E731
    spec = subject.memory.state_spec(BATCH, subject.capacity)
    state = jax.device_put(state, state_shardings(spec, mesh))
    tables = {name: put(("slots", "value_dim"), table) for name, table in tables.items()}
    return _placed_module(memory, put), rows(x), tables, state, jax.tree.map(rows, ctx), rows(w)


def _placed_module(memory: Any, put: Any) -> Any:
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    variables, structure = jax.tree.flatten(memory, is_leaf=is_variable)
    placed = []
    for variable in variables:
        leaf = variable[...]
        axes = variable.get_metadata().get("logical_axes") or (None,) * leaf.ndim
        placed.append(variable.replace(put(axes, leaf)))
    return jax.tree.unflatten(structure, placed)
