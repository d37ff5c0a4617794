"""Law 6: on any mesh of 8 devices, the results of one: outputs, state and gradients."""

from __future__ import annotations

import dataclasses

import jax

from memtrain.parallel.sharding import kernels_over
from memtrain.parallel.tokens import TokenSharding
from memtrain.testing.bench import Bench
from memtrain.testing.cases import BATCH, halves
from memtrain.testing.placing import (
    DEVICES,
    MeshSizes,
    Placing,
    described,
    factorisations,
    mesh_of_sizes,
    too_few_devices,
)
from memtrain.testing.report import Outcome
from memtrain.testing.subject import Subject
from memtrain.testing.tolerances import Judge
from memtrain_kernels import Layout


COVERING: tuple[MeshSizes, ...] = (
    (2, 2, 2, 1),
    (2, 2, 1, 2),
    (2, 1, 2, 2),
    (1, 2, 2, 2),
    (1, 1, 8, 1),
    (1, 1, 1, 4),
)
"""(data, fsdp, context, tensor): every three axes together, so every pair; the tokens over all
devices; a part of the devices."""


def check(bench: Bench) -> Outcome:
    judge = Judge("sharding")
    if too_few_devices(judge.outcome):
        return judge.outcome
    meshes = sorted({*COVERING, *factorisations(DEVICES)}) if bench.slow else COVERING
    subject = bench.subject()
    arguments = _arguments(subject)
    want = subject.forward_and_backward(*arguments)
    want_state = subject.live(want[1])
    length = halves(bench.length)[1]
    valid = subject.layout.valid[:, -length:]
    for sizes in meshes:
        # Parts of rows that do not divide stay whole.
        context = sizes[2] if length % sizes[2] == 0 else 1
        place = Placing(mesh_of_sizes(sizes), Layout("contiguous", context))
        case = f"mesh {described(sizes)}"
        with kernels_over(place.mesh, TokenSharding(place.layout)):
            outputs, state, gradients = subject.forward_and_backward(
                *_placed(subject, arguments, place)
            )
        # Padding's outputs are nobody's: they need not even be the same twice.
        judge.close(case, outputs, want[0], where=valid)
        # Brought together first: the program that brings it in order is that of one device.
        judge.close(case + ", final state", subject.live(jax.device_get(state)), want_state)
        judge.close(case, gradients, want[2], kind="gradient")
    judge.outcome.notes.append(f"{len(meshes)} meshes")
    return judge.outcome


def _arguments(subject: Subject) -> tuple:
    first, second = halves(subject.length)
    x, ctx, w = subject.x, subject.ctx, subject.cotangent
    _, state = subject.run((first,), x[:, :first], ctx.window(0, first))
    ctx = dataclasses.replace(ctx.window(first, first + second), tables={})
    return subject.memory, x[:, first:], subject.tables, state, ctx, w[:, first:]


def _placed(subject: Subject, arguments: tuple, place: Placing) -> tuple:
    """The arguments as a run on this mesh holds them."""
    memory, x, tables, state, ctx, w = arguments
    spec = subject.memory.state_spec(BATCH, subject.capacity)
    return (
        place.module(memory),
        place.tokens(x),
        place.tables(tables),
        place.state(spec, state),
        place.context(ctx),
        place.tokens(w),
    )
