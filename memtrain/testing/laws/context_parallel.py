"""Law 7: a sequence over devices, with a carried-in state, equals the serial one.

For memories that serve any order of tokens over devices: by transitions, a ring, or halos.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memtrain.parallel.sharding import kernels_over
from memtrain.parallel.tokens import TokenSharding
from memtrain.testing.bench import Bench
from memtrain.testing.cases import BATCH, draw_carried_layout
from memtrain.testing.placing import MeshSizes, Placing, mesh_of_sizes, too_few_devices
from memtrain.testing.report import Outcome
from memtrain.testing.subject import Subject
from memtrain.testing.tolerances import Judge
from memtrain_kernels import Layout
from memtrain_kernels.context.layout import KINDS


BEFORE, LENGTH = 13, 16
"""Tokens of the call before, whose state is carried in, and of the call that is sharded: both fit
in the least capacity of a subject."""

Case = tuple[str, MeshSizes, bool]
"""Layout, mesh (data, fsdp, context, tensor), and whether a state is carried in."""

COVERING: tuple[Case, ...] = (
    ("zigzag", (1, 1, 4, 1), True),
    ("striped", (1, 1, 2, 1), True),
    ("contiguous", (1, 1, 4, 1), False),
)
"""Contiguous tokens with a state, and rows over devices beside them, are in law 6."""
MESHES: tuple[MeshSizes, ...] = ((1, 1, 2, 1), (2, 1, 4, 1), (1, 1, 8, 1), (1, 2, 2, 2))
ALL: tuple[Case, ...] = tuple(
    (kind, mesh, carried) for kind in KINDS for mesh in MESHES for carried in (True, False)
)


def check(bench: Bench) -> Outcome:
    judge = Judge("context_parallel")
    subject = bench.subject()
    if not subject.memory.any_layout:
        judge.outcome.status = "not offered"
        judge.outcome.notes.append("any_layout is False: tokens in natural order only")
        return judge.outcome
    if too_few_devices(judge.outcome):
        return judge.outcome
    call = _Call(subject, bench.seed)
    if subject.memory.transition_rounds:
        _check_transitions(judge, call)
    else:
        judge.outcome.notes.append("no transitions")
    want = {}
    cases = ALL if bench.slow else COVERING
    for kind, mesh, carried in cases:
        if carried not in want:
            want[carried] = call.run(carried)
        place = Placing(mesh_of_sizes(mesh), Layout(kind, mesh[2]))  # type: ignore[arg-type]
        case = f"{kind} over {mesh[2]}, {'a state carried in' if carried else 'state=None'}"
        _compare(judge, case, call.run(carried, place), want[carried], call)
    judge.outcome.notes.append(f"{len(cases)} layouts on meshes")
    return judge.outcome


class _Call:
    """A call of `LENGTH` tokens after one of `BEFORE`."""

    def __init__(self, subject: Subject, seed: int):
        rng = np.random.default_rng(seed)
        self.subject = subject
        layout = draw_carried_layout(rng, BEFORE, LENGTH)
        x, ctx = subject.draw_inputs(rng, layout), layout.context(subject.tables)
        _, self.state = subject.step(x[:, :BEFORE], subject.init(), ctx.window(0, BEFORE))
        self.x = np.asarray(x)[:, BEFORE:]
        self.ctx = dataclasses.replace(ctx.window(BEFORE, BEFORE + LENGTH), tables={})
        self.valid = layout.valid[:, BEFORE:]
        w = rng.normal(size=self.x.shape).astype(np.float32)
        self.w = np.where(self.valid[..., None], w, 0)
        self._program = subject.jit(_forward_and_backward)

    def run(self, carried: bool, place: Placing | None = None) -> tuple[Any, Any, Any]:
        """(outputs, live state, gradients), tokens in natural order; serial without a `place`."""
        subject, state = self.subject, self.state if carried else None
        if place is None:
            return self._program(subject.memory, self.x, subject.tables, state, self.ctx, self.w)
        spec = subject.memory.state_spec(BATCH, subject.capacity)
        with kernels_over(place.mesh, TokenSharding(place.layout)):
            y, live, gradients = self._program(
                place.module(subject.memory),
                place.tokens(self.x),
                place.tables(subject.tables),
                None if state is None else place.state(spec, state),
                place.context(self.ctx),
                place.tokens(self.w),
            )
        back = lambda a: place.layout.restore(np.asarray(a))  # noqa: E731
        return back(y), live, {**gradients, "input": back(gradients["input"])}


def _forward_and_backward(memory, x, tables, state, ctx, w):
    """The loss reads the outputs, and of the final state what the future can feel."""

    def loss(memory, x, tables, state):
        y, after, _ = memory(x, state, dataclasses.replace(ctx, tables=tables))
        live = None if after is None else memory.live_state(after)
        return jnp.sum(y * w) + _felt(live), (y, live)

    gradient = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True, allow_int=True)
    gradients, (y, live) = gradient(memory, x, tables, state)
    names = ("parameters", "input", "tables", "state")
    return y, live, dict(zip(names, gradients, strict=True))


def _felt(state: Any) -> Any:
    """A sum over all floats of a state, each with a weight of its own."""
    total = 0.0
    for leaf in jax.tree.leaves(state):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            weights = np.cos(np.arange(leaf.size)).reshape(leaf.shape)
            total += jnp.sum(leaf * weights.astype(np.float32))
    return total


def _compare(judge: Judge, case: str, got: tuple, want: tuple, call: _Call) -> None:
    judge.close(case, got[0], want[0], where=call.valid)
    if want[1] is not None:
        judge.close(case + ", final state", got[1], want[1])
    judge.close(case, got[2], want[2], kind="gradient")


def _check_transitions(judge: Judge, call: _Call) -> None:
    """Any cut into runs, composed in any order, advances the state as the serial call does."""
    subject, cuts = call.subject, (0, 3, 5, LENGTH)

    def of(memory, x, ctx, state, begin, end):
        """The exact transition of tokens `begin` to `end`, by the state that enters them."""
        return memory.transition(x[:, begin:end], ctx.window(begin, end), state)

    def program(memory, x, ctx, state):
        entering, runs = state, []
        for begin, end in itertools.pairwise(cuts):
            runs.append(of(memory, x, ctx, entering, begin, end))
            entering = memory.advance(entering, runs[-1])
        a, b, c = runs
        left = memory.compose(memory.compose(a, b), c)
        right = memory.compose(a, memory.compose(b, c))
        _, after, _ = memory(x, state, ctx)
        states = [entering, *(memory.advance(state, t) for t in (left, right))]
        return [memory.live_state(s) for s in states], memory.live_state(after)

    ctx = dataclasses.replace(call.ctx, tables=subject.tables)
    states, want = subject.jit(program)(subject.memory, call.x, ctx, call.state)
    cases = ("run after run", "composed from the left", "composed from the right")
    for case, state in zip(cases, states, strict=True):
        judge.close(f"transitions, {case}, final state", state, want)
