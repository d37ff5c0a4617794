"""Running the blocks: all written out, or a scan over the repeats of the pattern.

A scan compiles one repeat whatever the depth; written out, XLA sees every layer, which is faster on
CPU and for single tokens. State goes through the scan as a carry that is updated in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from memtrain.memory.primitives import MATMUL
from memtrain.memory.protocol import Context
from memtrain.model.block import Block, Taps


_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(MATMUL),
}


def _rematerialised(function: Callable, policy: str) -> Callable:
    return function if policy == "none" else jax.checkpoint(function, policy=_POLICIES[policy])


@jax.custom_vjp
def _in_turn(leaves: list[Any]) -> list[Any]:
    """The same arrays. Backward, no gradient of them goes on before all of them are there.

    Around a block's parameters and its input: compilers else put off the products that make the
    gradients of parameters, and keep what these read, block after block.
    """
    return leaves


def _in_turn_forward(leaves):
    # What is frozen waits for nothing, so that its gradient is never made.
    return [leaf.value for leaf in leaves], [() if leaf.perturbed else None for leaf in leaves]


def _in_turn_backward(moving, cotangents):
    waits = [
        m is not None and not isinstance(ct, SymbolicZero)
        for m, ct in zip(moving, cotangents, strict=True)
    ]
    there = iter(
        jax.lax.optimization_barrier([ct for w, ct in zip(waits, cotangents, strict=True) if w])
    )
    return ([next(there) if w else None for w in waits],)


_in_turn.defvjp(_in_turn_forward, _in_turn_backward, symbolic_zeros=True)


def unstack(tree: Any, count: int) -> list[Any]:
    """Slices of a stacked tree. `split` transposes to one concatenate, where indexing would add up
    `count` padded copies."""
    leaves, structure = jax.tree.flatten(tree)
    columns = [
        [part.reshape(leaf.shape[1:]) for part in jax.lax.split(leaf, [1] * count, axis=0)]
        for leaf in leaves
    ]
    return [jax.tree.unflatten(structure, [c[i] for c in columns]) for i in range(count)]


def run_unrolled(
    layers: Sequence[Block],
    x: jax.Array,
    state: list[Any] | None,
    ctx: Context,
    without: Sequence[tuple[int, str]],
    remat: str,
    taps: Sequence[Taps] | None = None,
) -> tuple[jax.Array, list[Any] | None, list[Any]]:
    """Every layer in turn. See `LanguageModel.__call__`."""
    new_state, aux = [], []
    for i, layer in enumerate(layers):
        off = tuple(place for index, place in without if index == i)

        def run(layer, x, before, ctx, taps, off=off):
            return layer(x, before, ctx, off, taps)

        before = None if state is None else state[i]
        own = None if taps is None else taps[i]
        x, after, layer_aux = _rematerialised(run, remat)(layer, x, before, ctx, own)
        new_state.append(after)
        aux.append(layer_aux)
    return x, None if state is None else new_state, aux


def run_scanned(
    blocks: Sequence[Block],
    x: jax.Array,
    state: list[Any] | None,
    ctx: Context,
    repeats: int,
    unroll: int,
    remat: str,
    taps: Sequence[Taps] | None = None,
) -> tuple[jax.Array, list[Any] | None, list[Any]]:
    """A scan over the repeats; one repeat runs the whole pattern. See `LanguageModel.__call__`."""
    width = len(blocks)

    def one(layer: Block, x: jax.Array, before: Any, ctx: Context, taps: Taps | None):
        leaves, structure = jax.tree.flatten((layer, x))
        layer, x = jax.tree.unflatten(structure, _in_turn(leaves))
        return layer(x, before, ctx, taps=taps)

    run = _rematerialised(one, remat)

    def body(carry, xs):
        x, states = carry
        repeat, layers, taps = xs
        after, aux = [], []
        for i, layer in enumerate(layers):
            before = None if states is None else jax.tree.map(lambda s: s[repeat], states[i])
            # Block by block: a whole repeat recomputed at once is all its blocks' activations.
            x, new, layer_aux = run(layer, x, before, ctx, None if taps is None else taps[i])
            after.append(new)
            aux.append(layer_aux)
        if states is not None:
            put = lambda s, n: jax.lax.dynamic_update_index_in_dim(s, n, repeat, 0)  # noqa: E731
            states = [jax.tree.map(put, s, n) for s, n in zip(states, after, strict=True)]
        return (x, states), aux

    stacked = None
    if state is not None:
        stacked = [
            jax.tree.map(lambda *rows: jnp.stack(rows), *state[i::width]) for i in range(width)
        ]
    if taps is not None:
        taps = [jax.tree.map(lambda *t: jnp.stack(t), *taps[i::width]) for i in range(width)]
    xs = (jnp.arange(repeats), list(blocks), taps)
    (x, stacked), aux = jax.lax.scan(body, (x, stacked), xs, unroll=unroll)
    aux = [jax.tree.map(lambda a, r=r: a[r], aux[i]) for r in range(repeats) for i in range(width)]
    if stacked is None:
        return x, None, aux
    columns = [unstack(s, repeats) for s in stacked]
    return x, [columns[i][r] for r in range(repeats) for i in range(width)], aux
