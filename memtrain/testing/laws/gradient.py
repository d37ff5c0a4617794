"""Law 2: gradients do not depend on the cut, and `stop` cuts exactly at the state.

Leaf by leaf: inputs, every parameter and every shared table. Each must have a gradient at all: a
parameter that nothing reaches, or a table that is not the shared one, would pass every comparison.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memtrain.memory.protocol import is_leaf_spec
from memtrain.testing.bench import Bench
from memtrain.testing.cases import BATCH, halves
from memtrain.testing.report import Outcome
from memtrain.testing.subject import Subject
from memtrain.testing.tolerances import Judge


NO_GRADIENT = (
    "has no gradient: it is not used, or not this one is; or the test weights must be scaled so "
    "that it matters"
)


def check(bench: Bench) -> Outcome:
    judge = Judge("gradient")
    subject = bench.subject()
    whole = subject.gradient()
    judge.nonzero("state=None on the whole", whole, NO_GRADIENT)
    judge.close("full carry, token by token", _by_tokens(subject), whole, kind="gradient")
    cut = halves(bench.length)
    in_two = _in_two_calls(subject, cut)
    case = f"full carry, calls of {list(cut)} tokens"
    judge.close(case, in_two(subject.cotangent, False), whole, kind="gradient")
    _check_stop(judge, subject, cut, in_two)
    return judge.outcome


def _in_two_calls(subject: Subject, cut: tuple[int, int]) -> Callable:
    """The gradient as a function of the cotangent and of whether the carry is stopped."""
    capacity, (first, second) = subject.capacity, cut

    def loss(memory, x, tables, ctx, w, stop):
        # Inside the function: an initial state may read parameters.
        state = memory.init_state(BATCH, capacity)
        ctx = dataclasses.replace(ctx, tables=tables)
        y1, state, _ = memory(x[:, :first], state, ctx.window(0, first))
        # Data, not a branch: one program serves both.
        state = jax.tree.map(lambda s: jnp.where(stop, jax.lax.stop_gradient(s), s), state)
        y2, _, _ = memory(x[:, first:], state, ctx.window(first, first + second))
        return jnp.sum(jnp.concatenate([y1, y2], axis=1) * w)

    program = subject.jit(_gradient(loss))
    return lambda cotangent, stop: _named(
        *program(subject.memory, subject.x, subject.tables, subject.ctx, cotangent, stop)
    )


def _by_tokens(subject: Subject) -> dict[str, Any]:
    capacity = subject.capacity

    def loss(memory, x, tables, ctx, w):
        ctx = dataclasses.replace(ctx, tables=tables)

        def body(state, t):
            token = lambda a: jax.lax.dynamic_slice_in_dim(a, t, 1, axis=1)  # noqa: E731
            here = dataclasses.replace(
                ctx,
                positions=token(ctx.positions),
                starts=token(ctx.starts),
                valid=token(ctx.valid),
                token_ids=token(ctx.token_ids),
            )
            y, state, _ = memory(token(x), state, here)
            return state, jnp.sum(y * token(w))

        state = memory.init_state(BATCH, capacity)
        return jnp.sum(jax.lax.scan(body, state, jnp.arange(x.shape[1]))[1])

    program = subject.jit(_gradient(loss))
    arguments = subject.memory, subject.x, subject.tables, subject.ctx, subject.cotangent
    return _named(*program(*arguments))


def _check_stop(judge: Judge, subject: Subject, cut: tuple[int, int], in_two: Callable) -> None:
    """Two calls with the carry stopped, against the second alone, fed a state from outside."""
    first, second = cut

    case = f"stop, calls of {list(cut)} tokens"
    _, state = subject.run((first,), subject.x[:, :first], subject.ctx.window(0, first))
    *_, want = subject.forward_and_backward(
        subject.memory,
        subject.x[:, first:],
        subject.tables,
        state,
        dataclasses.replace(subject.ctx.window(first, first + second), tables={}),
        subject.cotangent[:, first:],
    )
    by_state = want.pop("state")
    last_only = np.where(np.arange(first + second)[:, None] < first, 0, subject.cotangent)
    got = in_two(last_only, True)
    judge.zero(case + ", before the stop", got["input"][:, :first])
    got["input"] = got["input"][:, first:]
    judge.close(case, got, want, kind="gradient")
    _check_flags(judge, subject, by_state)


def _check_flags(judge: Judge, subject: Subject, by_state: Any) -> None:
    """Gradients flow through the leaves of which the spec says so, and through no others."""
    spec = subject.memory.state_spec(BATCH, subject.capacity)
    specs = jax.tree.leaves(spec, is_leaf=is_leaf_spec)
    paths = jax.tree_util.tree_flatten_with_path(by_state)[0]
    for leaf, (path, gradient) in zip(specs, paths, strict=True):
        case = f"LeafSpec.gradient={leaf.gradient} of {jax.tree_util.keystr(path)}"
        if gradient.dtype == jax.dtypes.float0:
            judge.require(not leaf.gradient, case, "spec", "an integer leaf carries no gradient")
        elif leaf.gradient:
            judge.nonzero(case, {"state": gradient}, "no gradient flows through it")
        else:
            judge.zero(case, {"state": gradient})


def _gradient(loss: Any) -> Any:
    return jax.grad(loss, argnums=(0, 1, 2), allow_int=True)


def _named(memory: Any, x: Any, tables: Any) -> dict[str, Any]:
    return {"parameters": memory, "input": x, "tables": tables}
