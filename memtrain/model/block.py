"""A block: a mixer and a feed-forward place around the residual stream, each with its norm."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from memtrain.description import BuildContext, LayerDescription
from memtrain.errors import BadInput
from memtrain.memory.primitives import RMSNorm
from memtrain.memory.protocol import Aux, Context, Memory
from memtrain.model.config import Block as BlockConfig
from memtrain.parallel.sharding import constrain_tokens


PLACES = ("mixer", "ffn")

Taps = Mapping[str, Mapping[str, Array | None]]
"""For each place, the taps of the tables that it reads: see `Context.taps`."""


class Place(nnx.Module):
    """x + layer(norm(x)), or, gated, x + tanh(gate) layer(norm(x)) with a gate that begins as 0."""

    def __init__(
        self, layer: LayerDescription, context: BuildContext, *, gated: bool, rngs: nnx.Rngs
    ):
        self.norm = RMSNorm(context.dim, dtypes=context.dtypes, epsilon=context.norm_epsilon)
        self.layer = layer.build(context, rngs=rngs)
        self.gated = gated
        if gated:
            self.gate = nnx.Param(jnp.zeros((1,), context.dtypes.params), logical_axes=(None,))

    @property
    def memory(self) -> Memory | None:
        return self.layer if isinstance(self.layer, Memory) else None

    def __call__(
        self, x: Float[Array, "B T D"], state: Any, ctx: Context, *, off: bool = False
    ) -> tuple[Float[Array, "B T D"], Any, Aux]:
        """`off` leaves the layer out: the residual stream passes, and its state stays as it is."""
        if off:
            return x, state, Aux()
        if isinstance(self.layer, Memory):
            if not (self.layer.any_layout or ctx.layout.is_natural):
                raise BadInput(
                    f"mesh.context_layout={ctx.layout.kind}: {type(self.layer).__name__} takes "
                    "tokens in natural order only; contiguous fits"
                )
            y, state, aux = self.layer(self.norm(x), state, ctx)
        else:
            y, aux = self.layer(self.norm(x)), Aux()
        if self.gated:
            y = y * jnp.tanh(self.gate[...].astype(jnp.float32)).astype(y.dtype)
        return constrain_tokens(x + y), state, aux


class Block(nnx.Module):
    """The mixer's place, then the feed-forward's; either may be absent."""

    def __init__(self, config: BlockConfig, context: BuildContext, *, rngs: nnx.Rngs):
        def place(layer: LayerDescription | None) -> Place | None:
            if layer is None:
                return None
            return Place(layer, context, gated=config.residual_gate, rngs=rngs)

        self.mixer, self.ffn = place(config.mixer), place(config.ffn)

    def places(self) -> dict[str, Place]:
        found = {"mixer": self.mixer, "ffn": self.ffn}
        return {name: place for name, place in found.items() if place is not None}

    def memories(self) -> dict[str, Memory]:
        found = {name: place.memory for name, place in self.places().items()}
        return {name: memory for name, memory in found.items() if memory is not None}

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: Any,
        ctx: Context,
        off: tuple[str, ...] = (),
        taps: Taps | None = None,
    ) -> tuple[Float[Array, "B T D"], Any, dict[str, Aux]]:
        """`state` is {place: state of its memory}, or None. `off`: places left out."""
        new_state, aux = {}, {}
        for name, place in self.places().items():
            if taps is not None:
                ctx = dataclasses.replace(ctx, taps=taps.get(name, {}))
            before = None if state is None or place.memory is None else state[name]
            x, after, aux[name] = place(x, before, ctx, off=name in off)
            if place.memory is not None:
                new_state[name] = after
        return x, None if state is None else new_state, aux
