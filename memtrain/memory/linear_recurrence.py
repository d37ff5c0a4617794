"""LinearRecurrence: every channel keeps a fading sum of its inputs, and each token says how fast.

    a[t] = exp(-8 sigmoid(W_a u[t]) softplus(rate))             in (0, 1), channel by channel
    h[t] = a[t] h[t-1] + sqrt(1 - a[t]^2) W_v u[t]          h = 0 before a document
    y[t] = W_o (h[t] * silu(W_g x[t]))

u is x, or a short convolution of it. A minimal gated linear recurrence (Martin and Cundy 2018,
arXiv 1709.04057; the decay and its scale as in RG-LRU, De et al. 2024, arXiv 2402.19427). Linear in
h, so that a scan computes all tokens in a logarithm of steps, and runs of tokens compose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from memtrain.description import BuildContext, LayerDescription, at_least
from memtrain.memory.primitives import Linear
from memtrain.memory.protocol import Aux, Context, LeafSpec, State, Transition
from memtrain.memory.recurrent import Recurrent
from memtrain.memory.short_conv import ShortConv, ShortConvConfig
from memtrain.memory.tail import run_tail


_SHARPNESS = 8.0
"""How much faster than at rest a token can make its channel forget, twice over."""

_LEAST_INFLOW = 1e-6
"""Of 1 - a^2: below it the square root's slope would grow without bound."""


@dataclass(frozen=True)
class LinearRecurrenceConfig(LayerDescription):
    """Description of `LinearRecurrence`."""

    state_dim: int | None = None
    """Channels; the model's width unless given."""
    conv: int | None = 4
    """A depthwise causal convolution mixes this many tokens first, the current one included."""
    min_decay: float = 0.9
    max_decay: float = 0.999
    """Channels start with a decay a token between these, where the token's gate is fully open."""

    def __post_init__(self):
        at_least(self, "", {"state_dim": 1, "conv": 2})
        if not 0 < self.min_decay <= self.max_decay < 1:
            raise ValueError(
                f"min_decay={self.min_decay}, max_decay={self.max_decay}: they take values with "
                "0 < min_decay <= max_decay < 1"
            )

    def build(self, context: BuildContext, *, rngs: nnx.Rngs) -> LinearRecurrence:
        return LinearRecurrence(self, context, rngs=rngs)


class LinearRecurrence(Recurrent):
    """A gated linear recurrence. Its state is one float32 number a channel, and the convolution's.

    Tokens may be sharded over devices: transitions are (product of decays, sum from empty).
    """

    scanned = "hidden"

    def __init__(self, config: LinearRecurrenceConfig, context: BuildContext, *, rngs: nnx.Rngs):
        self.config, dtypes = config, context.dtypes
        self.state_dim = config.state_dim or context.dim
        linear = lambda *dims, axes, scale=1.0: Linear(  # noqa: E731
            *dims, axes=axes, dtypes=dtypes, rngs=rngs, scale=scale
        )
        if config.conv is not None:
            self.conv = ShortConv(ShortConvConfig(config.conv), context, rngs=rngs)
        into = context.dim, self.state_dim
        self.decay = linear(*into, axes=("embed", "mlp"))
        self.value = linear(*into, axes=("embed", "mlp"))
        self.gate = linear(*into, axes=("embed", "mlp"))
        out_scale = (2 * context.depth) ** -0.5
        self.output = linear(self.state_dim, context.dim, axes=("mlp", "embed"), scale=out_scale)
        drawn = jax.random.uniform(
            rngs.params(), (self.state_dim,), jnp.float32, config.min_decay, config.max_decay
        )
        rate = jnp.log(jnp.expm1(-jnp.log(drawn) / _SHARPNESS))  # softplus undone
        self.rate = nnx.Param(rate.astype(dtypes.params), logical_axes=("mlp",))

    def _convs(self) -> dict[str, ShortConv]:
        return {} if self.config.conv is None else {"conv": self.conv}

    def state_spec(self, batch: int, capacity: int) -> dict[str, Any]:
        # A sum over many tokens stays float32, whatever the dtype of the activations.
        spec: dict[str, Any] = {
            "hidden": LeafSpec((batch, self.state_dim), jnp.float32, ("batch", "mlp"))
        }
        if self.config.conv is not None:
            spec["conv"] = self.conv.state_spec(batch, capacity)
        return spec

    def _begin(
        self, x: Float[Array, "B T D"], ctx: Context, before: State | None
    ) -> tuple[Transition, tuple[Array, Array, Array]]:
        """The transition is {"kept", "sum"}, float32 [B, N], and the convolution's tail."""
        u, tail = x, {}
        if self.config.conv is not None:
            u, _, _ = self.conv(x, None if before is None else before["conv"], ctx)
            tail = {"conv": run_tail(x, ctx, self.config.conv - 1)}
        kept, h = self._scan(u, ctx)
        return {"kept": kept[:, -1], "sum": h[:, -1], **tail}, (x, kept, h)

    def _end(
        self, ctx: Context, work: tuple[Array, Array, Array], state: State | None
    ) -> tuple[Float[Array, "B T D"], Aux]:
        x, kept, h = work
        if state is not None:
            h = h + kept * state["hidden"][:, None]
        return self.output(h.astype(x.dtype) * jax.nn.silu(self.gate(x))), Aux()

    def _scan(
        self, u: Float[Array, "B T D"], ctx: Context
    ) -> tuple[Float[Array, "B T N"], Float[Array, "B T N"]]:
        """Of the run up to each token: how much of what entered is left, and the sum from empty."""
        gate = jax.nn.sigmoid(self.decay(u).astype(jnp.float32))
        log_decay = -_SHARPNESS * gate * jax.nn.softplus(self.rate[...].astype(jnp.float32))
        inflow = jnp.sqrt(jnp.maximum(-jnp.expm1(2 * log_decay), _LEAST_INFLOW))
        new = inflow * self.value(u).astype(jnp.float32)
        # A document begins: nothing of the one before is left. Padding changes nothing.
        decay = jnp.where(ctx.starts[..., None], 0.0, jnp.exp(log_decay))
        valid = ctx.valid[..., None]
        element = jnp.where(valid, decay, 1.0), jnp.where(valid, new, 0.0)
        return jax.lax.associative_scan(_join, element, axis=1)

    def _follow(self, first: Transition, then: Transition) -> dict[str, Any]:
        """Products of decays, and sums decayed by what follows them."""
        kept, total = _join((first["kept"], first["sum"]), (then["kept"], then["sum"]))
        return {"kept": kept, "sum": total}

    def _advance(self, state: State, transition: Transition) -> Array:
        """kept * hidden + sum."""
        return transition["kept"] * state["hidden"] + transition["sum"]


def _join(first: tuple[Array, Array], then: tuple[Array, Array]) -> tuple[Array, Array]:
    """(kept, sum) of two runs, one after the other."""
    return first[0] * then[0], then[0] * first[1] + then[1]
