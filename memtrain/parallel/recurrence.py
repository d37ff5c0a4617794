"""Recurrences over a sequence that is split over devices.

Each device makes the transitions of its own stretches. All transitions are gathered, composed in
the order of the text and applied to the carried state; that gives the state that enters each
stretch, and every stretch is then run from its own. Activations stay where they are: what travels
is one transition for each stretch, whatever the length of the sequence. Every device holds all of
them for a moment; that is little while a state is smaller than a device's share of the tokens over
the number of stretches.

The prefix over stretches is that of parallel scans (Blelloch 1990; for linear recurrences Martin
and Cundy 2018, arXiv 1709.04057).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from memtrain_kernels import Layout
from memtrain_kernels.partition import current_partition, is_manual


if TYPE_CHECKING:
    from memtrain.memory.protocol import Aux, Context, Memory, State, Transition


Begin = Callable[..., tuple[Any, Any]]
End = Callable[..., tuple[Array, Any]]


def over_stretches(
    memory: Memory,
    x: Float[Array, "B T D"],
    state: State | None,
    ctx: Context,
    *,
    begin: Begin | None = None,
    end: End | None = None,
) -> tuple[Float[Array, "B T D"], State | None, Aux]:
    """The memory's call on tokens in `ctx.layout`, by its transitions.

    For the calls of memories that offer them: each stretch becomes a call of its own, in natural
    order and with a state. Striped tokens are exchanged into contiguous stretches first, and back.

    begin, end: the call in two halves, where most of its work is that of the transition: without
      them it is done twice, and so is its backward. begin(x, ctx, before) -> (transition, work);
      end(work, state) -> (outputs, aux).

    Raises ValueError for lengths that the layout cannot split, for memories that offer no
    transitions, and for those that report losses, which belong to no stretch.
    """
    layout, (B, T) = ctx.layout, x.shape[:2]
    if memory.transition_rounds < 1:
        raise ValueError(f"{type(memory).__name__} offers no transitions")
    layout.check(T)
    if layout.kind == "striped" and layout.devices > 1:
        y, state, aux = over_stretches(memory, *_contiguous(x, state, ctx), begin=begin, end=end)
        back = lambda a: _held(layout.arrange(_held(a)))  # noqa: E731
        return back(y), state, dataclasses.replace(aux, reads=jax.tree.map(back, aux.reads))
    stretches = layout.devices * layout.pieces
    cut = lambda a: _held(_held(a).reshape(B, stretches, -1, *a.shape[2:]))  # noqa: E731
    x_BPLD, tokens = cut(x), [None if a is None else cut(a) for a in _tokens_of(ctx)]
    here = lambda *tokens: _context(ctx, Layout(), *tokens)  # noqa: E731
    first = begin or (lambda x, ctx, before: (memory.transition(x, ctx, before), None))
    over = lambda function: jax.vmap(function, in_axes=1, out_axes=1)  # noqa: E731
    begun = over(lambda x, before, *t: first(x, here(*t), before))

    carried = memory.init_state(B, T) if state is None else state
    entering = jax.tree.map(lambda s: jnp.repeat(s[:, None], stretches, axis=1), carried)
    final, work = carried, None
    for _ in range(memory.transition_rounds):
        transitions, work = begun(x_BPLD, entering, *tokens)
        entering, final = entering_states(memory, transitions, carried, layout)

    def to_end(x, work, before, *tokens) -> tuple[Array, Aux]:
        if end is not None:
            return end(work, before)
        y, _, aux = memory(x, before, here(*tokens))
        return y, aux

    y_BPLD, aux = jax.vmap(to_end, in_axes=1, out_axes=(1, 0))(x_BPLD, work, entering, *tokens)
    y = _held(_held(y_BPLD).reshape(B, T, -1))
    return y, None if state is None else final, _joined(memory, aux, (B, T))


def entering_states(
    memory: Memory, transitions: Transition, carried: State, layout: Layout
) -> tuple[State, State]:
    """The state that enters each stretch, [B, P, ...] in device order, and the one after the last.

    transitions: of all stretches, [B, P, ...] in device order. carried: [B, ...], enters the first.
    """
    order = stretch_order(layout)
    natural = jax.tree.map(lambda a: _held(a, whole=True)[:, np.argsort(order)], transitions)
    over = lambda function, axes: jax.vmap(function, in_axes=axes, out_axes=1)  # noqa: E731
    upto = jax.lax.associative_scan(over(memory.compose, (1, 1)), natural, axis=1)
    after = over(memory.advance, (None, 1))(carried, upto)
    shifted = jax.tree.map(
        lambda c, a: jnp.concatenate([c[:, None].astype(a.dtype), a[:, :-1]], axis=1),
        carried,
        after,
    )
    entering = jax.tree.map(lambda a: _held(a[:, order]), shifted)
    return entering, jax.tree.map(lambda a: a[:, -1], after)


def stretch_order(layout: Layout) -> np.ndarray:
    """For each stretch in device order, which one of the text it is."""
    ranks, local = range(layout.devices), layout.pieces
    return np.array([run.start for rank in ranks for run in layout.runs(rank, local)])


def _tokens_of(ctx: Context) -> tuple[Array | None, ...]:
    return ctx.positions, ctx.starts, ctx.valid, ctx.token_ids


def _context(ctx: Context, layout: Layout, *tokens: Array | None) -> Context:
    """`ctx` of other tokens: documents are counted anew."""
    positions, starts, valid, token_ids = tokens
    return dataclasses.replace(
        ctx,
        positions=positions,
        starts=starts,
        valid=valid,
        token_ids=token_ids,
        begun=None,
        layout=layout,
    )


def _contiguous(x: Array, state: State | None, ctx: Context) -> tuple[Array, State | None, Context]:
    """Striped tokens as contiguous stretches over the same devices: each sends its share once."""
    layout = ctx.layout
    turn = lambda a: None if a is None else _held(layout.restore(_held(a)))  # noqa: E731
    tokens = map(turn, _tokens_of(ctx))
    return turn(x), state, _context(ctx, Layout("contiguous", layout.devices), *tokens)  # type: ignore[return-value]


def _joined(memory: Memory, aux: Aux, shape: tuple[int, int]) -> Aux:
    """What the stretches report, as one call's: metrics averaged, reads in the tokens' order."""
    if aux.losses:
        raise ValueError(
            f"{type(memory).__name__} reports losses {sorted(aux.losses)}, and its tokens are cut "
            "into stretches: it must sum them over all tokens itself"
        )
    reads = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(*shape, -1), aux.reads)
    return dataclasses.replace(
        aux, metrics=jax.tree.map(lambda m: m.mean(axis=0), aux.metrics), reads=reads
    )


def _held(a: Any, *, whole: bool = False) -> Any:
    """[B, tokens or stretches, ...] held to its rows, and to its tokens; or `whole` along them.

    The other dimensions lie as they come. As it is outside `memtrain_kernels.partitioned`.
    """
    part = current_partition()
    if part is None or part.mesh.size == 1 or is_manual() or part.sequence is None:
        return a
    along = None if whole else part.axes((part.sequence,), a.shape[1])
    free = (PartitionSpec.UNCONSTRAINED,) * (a.ndim - 2)
    spec = PartitionSpec(part.axes(part.batch, a.shape[0]), along, *free)
    return jax.lax.with_sharding_constraint(a, NamedSharding(part.mesh, spec))
