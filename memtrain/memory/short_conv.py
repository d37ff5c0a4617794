"""ShortConv: every channel mixes its own last few values, inside a document.

    y[t] = sum over i < size of w[i] * x[t - i], and a bias if asked

A depthwise causal convolution. In front of attention it lets a key know the tokens before its own,
so that one layer can find what followed them; without it, that takes two (Olsson et al. 2022, on
smeared keys; Allen-Zhu 2025, arXiv 2512.17351, on such layers anywhere in the residual stream).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from memtrain.description import BuildContext, LayerDescription, at_least
from memtrain.memory.protocol import (
    Aux,
    Context,
    LeafSpec,
    Memory,
    State,
    Transition,
    token_documents,
)
from memtrain.memory.tail import join_tails, run_tail
from memtrain.parallel.halo import halos, has_halos
from memtrain.parallel.recurrence import over_stretches
from memtrain_kernels import Layout


@dataclass(frozen=True)
class ShortConvConfig(LayerDescription):
    """Description of `ShortConv`."""

    size: int = 4
    """Tokens that are mixed, the current one included."""
    shift: bool = False
    """Start as a shift by one token; as a random mix otherwise."""
    bias: bool = False
    """A number of its own is added to every channel; it begins as zero."""

    def __post_init__(self):
        at_least(self, "", {"size": 2})

    def build(self, context: BuildContext, *, rngs: nnx.Rngs) -> ShortConv:
        return ShortConv(self, context, rngs=rngs)


class ShortConv(Memory):
    """A depthwise causal convolution. Its state is the last `size - 1` inputs of each row."""

    any_layout = True
    transition_rounds = 1

    def __init__(
        self,
        config: ShortConvConfig,
        context: BuildContext,
        *,
        rngs: nnx.Rngs,
        axis: str | None = "embed",
    ):
        """`axis`: logical axis of the channels."""
        self.size, self.dim, self.dtypes = config.size, context.dim, context.dtypes
        self.axis = axis
        if config.shift:
            taps = jnp.zeros((config.size, context.dim), jnp.float32).at[1].set(1.0)
        else:
            bound = config.size**-0.5
            taps = jax.random.uniform(
                rngs.params(), (config.size, context.dim), jnp.float32, -bound, bound
            )
        self.taps = nnx.Param(taps.astype(context.dtypes.params), logical_axes=(None, axis))
        if config.bias:
            zeros = jnp.zeros((context.dim,), context.dtypes.params)
            self.bias = nnx.Param(zeros, logical_axes=(axis,))
        self.has_bias = config.bias

    def state_spec(self, batch: int, capacity: int) -> dict[str, LeafSpec]:
        before = self.size - 1
        index = LeafSpec((batch, before), jnp.int32, ("batch", None), gradient=False, fill=-1)
        return {
            "input": LeafSpec(
                (batch, before, self.dim),
                jnp.dtype(self.dtypes.state),
                ("batch", None, self.axis),
            ),
            "document": index,
            "current_document": LeafSpec((batch,), jnp.int32, ("batch",), gradient=False),
        }

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None, ctx: Context
    ) -> tuple[Float[Array, "B T D"], State | None, Aux]:
        B, T, _ = x.shape
        before = self.size - 1
        first = jnp.zeros((B,), jnp.int32) if state is None else state["current_document"]
        documents, current = token_documents(first, ctx)
        layout = ctx.layout
        if state is None and has_halos(layout, T, before):
            return self._over_pieces(x, documents, layout), None, Aux()
        if layout.devices > 1:
            return over_stretches(self, x, state, ctx)
        inputs = jnp.pad(x, ((0, 0), (before, 0), (0, 0)))
        owners = jnp.pad(documents, ((0, 0), (before, 0)), constant_values=-1)
        new_state = None
        if state is not None:
            # What came before stands right before the first valid token, wherever that is.
            begin = jnp.argmax(ctx.valid, axis=1)
            end = begin + jnp.sum(ctx.valid, axis=1)
            inputs = _put(inputs, state["input"].astype(x.dtype), begin)
            owners = _put(owners, state["document"], begin)
            new_state = {
                "input": _take(inputs, end, before).astype(state["input"].dtype),
                "document": _take(owners, end, before),
                "current_document": current,
            }
        return self._mix(x, inputs, owners, documents), new_state, Aux()

    def _mix(self, x, inputs, owners, documents) -> Array:
        """Taps over `inputs`, which are x with `size - 1` tokens before it."""
        before, T = self.size - 1, x.shape[1]
        taps = self.taps[...].astype(x.dtype)
        y = x * taps[0]
        if self.has_bias:
            y = y + self.bias[...].astype(x.dtype)
        for i in range(1, self.size):
            at = slice(before - i, before - i + T)
            same = (owners[:, at] == documents)[..., None]
            y = y + jnp.where(same, inputs[:, at] * taps[i], jnp.zeros((), x.dtype))
        return y

    def _over_pieces(self, x, documents, layout: Layout) -> Array:
        """Rows that are split over devices: each stretch with the end of the one before it."""
        size = self.size - 1
        halo_x, halo_owner = halos(x, layout, size), halos(documents + 1, layout, size) - 1
        # Stretches keep a dimension of their own: merged with the rows they would lie on no mesh.
        cut = lambda a: a.reshape(*halo_x.shape[:2], -1, *a.shape[2:])  # noqa: E731
        pieces, owners = cut(x), cut(documents)
        inputs = jnp.concatenate([halo_x, pieces], axis=2)
        before = jnp.concatenate([halo_owner, owners], axis=2)
        mix = jax.vmap(self._mix, in_axes=1, out_axes=1)
        return mix(pieces, inputs, before, owners).reshape(x.shape)

    def transition(
        self, x: Float[Array, "B T D"], ctx: Context, before: State | None
    ) -> Transition:
        """The run's tail: in form a state, whose documents are counted from the run's beginning."""
        return run_tail(x, ctx, self.size - 1)

    def compose(self, first: Transition, then: Transition) -> Transition:
        return join_tails(first, then)

    def advance(self, state: State, transition: Transition) -> State:
        return join_tails(state, transition)

    def live_state(self, state: State) -> State:
        """Inputs of earlier documents are set to zero: no later token mixes them."""
        live = state["document"] == state["current_document"][:, None]
        return {
            "input": jnp.where(live[..., None], state["input"], 0),
            "document": jnp.where(live, state["document"], -1),
            "current_document": state["current_document"],
        }


def _put(rows: Array, piece: Array, begin: Int[Array, "B"]) -> Array:
    """`piece` written over `rows` from `begin` on, along the token axis of each row."""
    return jax.vmap(lambda r, p, b: jax.lax.dynamic_update_slice_in_dim(r, p, b, 0))(
        rows, piece, begin
    )


def _take(rows: Array, begin: Int[Array, "B"], length: int) -> Array:
    """`length` tokens of each row from `begin` on."""
    return jax.vmap(lambda r, b: jax.lax.dynamic_slice_in_dim(r, b, length, 0))(rows, begin)
