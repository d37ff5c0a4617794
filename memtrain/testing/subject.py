"""A memory under test: built small, compiled once per shape, and run in any cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memtrain.description import Dtypes
from memtrain.memory.protocol import Context, Memory, State
from memtrain.testing.cases import BATCH, LEAST_CAPACITY, Layout, draw_layout
from memtrain.testing.tolerances import LEAST_MOVE, TOP_K_MARGIN


MakeMemory = Callable[[Dtypes, nnx.Rngs], Memory]


class Subject:
    """One memory, its tables, and a batch drawn for it."""

    def __init__(
        self,
        make_memory: MakeMemory,
        dtypes: Dtypes,
        *,
        dim: int,
        seed: int,
        length: int,
        optimized: bool,
    ):
        self.make_memory, self.dtypes, self.dim, self.seed = make_memory, dtypes, dim, seed
        self.length, self.optimized = length, optimized
        # Also law 7's, which needs a number that the devices divide: one program serves both.
        self.capacity = max(-(-(length + 3) // BATCH) * BATCH, LEAST_CAPACITY)
        self.memory = make_memory(dtypes, nnx.Rngs(seed))
        rng = np.random.default_rng(seed)
        # Unit rows, larger than a model's: what the memory reads must be felt in its output.
        self.tables = {
            name: jnp.asarray(
                rng.normal(size=(spec.num_slots, spec.value_dim)), jnp.dtype(dtypes.of_tables)
            )
            for name, spec in self.memory.table_specs().items()
        }
        self.layout = draw_layout(rng, length)
        self.ctx = self.layout.context(self.tables)
        # A function of our own: broken variants of one class must not share a compilation.
        self._step = self.jit(lambda memory, x, state, ctx: memory(x, state, ctx)[:2])
        self._live = self.jit(lambda memory, state: memory.live_state(state))
        self._init: dict[tuple[int, int], Callable] = {}
        self._margin = self.jit(lambda memory, x, ctx: memory.selection_margin(x, None, ctx))
        self.x = self.draw_inputs(rng, self.layout)
        self.forward_and_backward = self.jit(_forward_and_backward())
        self.cotangent = rng.normal(size=self.x.shape).astype(np.float32)
        self.cotangent[~self.layout.valid] = 0
        self._gradient: Callable | None = None

    def jit(self, function: Callable) -> Callable:
        """`jax.jit`; on CPU without the optimisation of machine code, which takes half the time."""
        fast = jax.default_backend() == "cpu" and not self.optimized
        options = {"xla_backend_optimization_level": 0} if fast else None
        return jax.jit(function, compiler_options=options)

    def draw_inputs(self, rng: np.random.Generator, layout: Layout) -> jax.Array:
        """[BATCH, T, dim] in the compute dtype: margins as the table asks, and one token twice."""
        twin, original = layout.valid.shape[1] // 2, layout.valid.shape[1] // 4
        x = rng.normal(size=(*layout.valid.shape, self.dim))
        least = TOP_K_MARGIN[self.dtypes.compute]
        ctx = layout.context(self.tables)
        for _ in range(200):
            # An exact tie, for memories that select among what they were given.
            x[0, twin], layout.token_ids[0, twin] = x[0, original], layout.token_ids[0, original]
            inputs = jnp.asarray(x, self.dtypes.compute)
            margin = self._margin(self.memory, inputs, ctx)
            if margin is None:
                return inputs
            margin = np.asarray(margin)
            near = (margin > 0) & (margin < least)
            if not near.any():
                return inputs
            # A token's margin hangs on those before it: the first of each row is drawn again.
            rows = np.flatnonzero(near.any(axis=1))
            first = near[rows].argmax(axis=1)
            first[(rows == 0) & (first == twin)] = original
            x[rows, first] = rng.normal(size=(len(rows), self.dim))
        raise ValueError(f"no inputs found whose top-k margins are at least {least}")

    def init(self, batch: int = BATCH, capacity: int | None = None) -> State:
        capacity = capacity or self.capacity
        if (batch, capacity) not in self._init:
            self._init[batch, capacity] = self.jit(lambda m: m.init_state(batch, capacity))
        return self._init[batch, capacity](self.memory)

    def step(self, x: Any, state: State | None, ctx: Context) -> tuple[jax.Array, State | None]:
        """One compiled call."""
        return self._step(self.memory, x, state, ctx)

    def run(
        self,
        cut: Sequence[int] | None,
        x: Any = None,
        ctx: Context | None = None,
        state: State | None = None,
    ) -> tuple[np.ndarray, State | None]:
        """Outputs [B, T, D] and the last state of a sequence cut into calls of these lengths.

        None is `state=None` on the whole. The drawn batch, from empty, unless given others.
        """
        x = self.x if x is None else x
        ctx = self.ctx if ctx is None else ctx
        if cut is None:
            y, after = self.step(x, None, ctx)
            return np.asarray(y), after
        if state is None:
            state = self.init(x.shape[0])
        x, outputs, at = np.asarray(x), [], 0
        for n in cut:
            y, state = self.step(x[:, at : at + n], state, ctx.window(at, at + n))
            outputs.append(np.asarray(y))
            at += n
        return np.concatenate(outputs, axis=1), state

    def gradient(self, cotangent: np.ndarray | None = None) -> dict[str, Any]:
        """Of sum(output * cotangent) with `state=None`, by parameters, inputs and tables."""
        if self._gradient is None:

            def loss(memory, x, tables, ctx, w):
                y, _, _ = memory(x, None, dataclasses.replace(ctx, tables=tables))
                return jnp.sum(y * w)

            self._gradient = self.jit(jax.grad(loss, argnums=(0, 1, 2), allow_int=True))
        w = self.cotangent if cotangent is None else cotangent
        gradients = self._gradient(self.memory, self.x, self.tables, self.ctx, w)
        return dict(zip(("parameters", "input", "tables"), gradients, strict=True))

    def live(self, state: State) -> State:
        return self._live(self.memory, state)

    @property
    def has_state(self) -> bool:
        return bool(jax.tree.leaves(self.memory.state_spec(1, 1)))

    def moves(self) -> tuple[float, float | None]:
        """How far the memory moves its block, and how far what it carried does: rms over input rms.

        The second is None for a memory without state: it is felt where a document goes on from one
        half to the other.
        """
        layout, half = self.layout, self.length // 2
        size = _rms(np.asarray(self.x)[layout.valid])
        if not self.has_state:
            return _rms(self.run(None)[0][layout.valid]) / size, None
        cut = (1,) * self.length
        whole, _ = self.run(cut)
        x, ctx = self.x[:, half:], self.ctx.window(half, self.length)
        forgetful, _ = self.run(cut[half:], x, ctx)
        goes_on = layout.documents[:, half:] == layout.documents[:, half - 1 : half]
        goes_on &= layout.valid[:, half:]
        carried = _rms((whole[:, half:] - forgetful)[goes_on])
        return _rms(whole[layout.valid]) / size, carried / size

    def assert_moves(self) -> str | None:
        """Why a law on this memory would prove nothing, or None."""
        moved, carried = self.moves()
        if not moved >= LEAST_MOVE:
            return f"the memory moves its block's output by {moved:.3f} of its input"
        if carried is not None and not carried >= LEAST_MOVE:
            return f"what the memory carries moves its block's output by {carried:.3f} of its input"
        return None


def _forward_and_backward() -> Callable:
    """(memory, x, tables, state, ctx, w) -> outputs, state, gradients of sum(outputs * w) by name.

    One call with a carried state; ctx without tables.
    """

    def loss(memory, x, tables, state, ctx, w):
        y, state, _ = memory(x, state, dataclasses.replace(ctx, tables=tables))
        return jnp.sum(y * w), (y, state)

    gradient = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True, allow_int=True)

    def program(*arguments):
        gradients, (y, state) = gradient(*arguments)
        names = ("parameters", "input", "tables", "state")
        return y, state, dict(zip(names, gradients, strict=True))

    return program


def _rms(a: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(a.astype(np.float64)))))
