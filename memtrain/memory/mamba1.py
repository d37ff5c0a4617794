"""Mamba1: a selective state space layer (Gu and Dao 2023, arXiv 2312.00752).

    h[t] = exp(-d[t] A) h[t-1] + d[t] u[t] B[t]           for each channel, h of state_dim numbers
    y[t] = W_o ((h[t] . C[t] + D u[t]) * silu(z[t]))

u and z are projections of the input, u convolved over a few tokens and put through SiLU; B, C and
the steps d = softplus(W_d r + bias), of few numbers r, are projections of u. With `inner_norm` r, B
and C are normed first, as in Jamba (Lieber et al. 2024, arXiv 2403.19887).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from memtrain.description import BuildContext, LayerDescription, at_least
from memtrain.memory.matrix import draw_decay
from memtrain.memory.primitives import Linear, RMSNorm
from memtrain.memory.protocol import Aux, Context, LeafSpec, State, Transition
from memtrain.memory.recurrent import Recurrent
from memtrain.memory.short_conv import ShortConv, ShortConvConfig
from memtrain.memory.tail import run_tail
from memtrain_kernels import selective_scan, selective_transition


@dataclass(frozen=True)
class Mamba1Config(LayerDescription):
    """Description of `Mamba1`."""

    expand: int = 2
    """The inner width over the model's."""
    state_dim: int = 16
    """Numbers that the state holds for each channel."""
    step_rank: int | None = None
    """Numbers that steps are made of; a sixteenth of the width, rounded up, unless given."""
    conv: int = 4
    """Tokens that are convolved, the current one included."""
    inner_norm: bool = False
    """RMS norms of what steps are made of, and of B and C."""

    def __post_init__(self):
        at_least(self, "", {"expand": 1, "state_dim": 1, "step_rank": 1, "conv": 2})

    def build(self, context: BuildContext, *, rngs: nnx.Rngs) -> Mamba1:
        return Mamba1(self, context, rngs=rngs)


class Mamba1(Recurrent):
    """A selective scan. Its state is `state_dim` float32 numbers a channel, and the convolution's
    tail. Tokens may be sharded over devices."""

    scanned = "hidden"

    def __init__(self, config: Mamba1Config, context: BuildContext, *, rngs: nnx.Rngs):
        dim, dtypes = context.dim, context.dtypes
        self.config, self.inner, N = config, config.expand * dim, config.state_dim
        rank = config.step_rank or -(-dim // 16)
        linear = lambda *dims, axes, scale=1.0: Linear(  # noqa: E731
            *dims, axes=axes, dtypes=dtypes, rngs=rngs, scale=scale
        )
        self.value = linear(dim, self.inner, axes=("embed", "mlp"))
        self.gate = linear(dim, self.inner, axes=("embed", "mlp"))
        inner = dataclasses.replace(context, dim=self.inner)
        conv = ShortConvConfig(config.conv, bias=True)
        self.conv = ShortConv(conv, inner, rngs=rngs, axis="mlp")
        self.step_in = linear(self.inner, rank, axes=("mlp", None))
        self.key = linear(self.inner, N, axes=("mlp", None))
        self.query = linear(self.inner, N, axes=("mlp", None))
        self.step = linear(rank, self.inner, axes=(None, "mlp"))
        if config.inner_norm:
            epsilon = context.norm_epsilon
            self.step_norm = RMSNorm(rank, dtypes=dtypes, epsilon=epsilon)
            self.key_norm = RMSNorm(N, dtypes=dtypes, epsilon=epsilon)
            self.query_norm = RMSNorm(N, dtypes=dtypes, epsilon=epsilon)
        self.step_bias, _ = draw_decay(self.inner, 1, dtypes.params, rngs, axis="mlp")
        # Every channel begins with rates 1 .. N (S4D-Real, Gu et al. 2022).
        rates = jnp.broadcast_to(jnp.arange(1, N + 1), (self.inner, N))
        axes = ("mlp", "rates")  # no matrix: weight decay would pull all rates to one
        self.log_rate = nnx.Param(jnp.log(rates).astype(dtypes.params), logical_axes=axes)
        self.skip = nnx.Param(jnp.ones((self.inner,), dtypes.params), logical_axes=("mlp",))
        out_scale = (2 * context.depth) ** -0.5
        self.output = linear(self.inner, dim, axes=("mlp", "embed"), scale=out_scale)

    def state_spec(self, batch: int, capacity: int) -> dict[str, Any]:
        shape = (batch, self.inner, self.config.state_dim)
        return {
            "hidden": LeafSpec(shape, jnp.float32, ("batch", "mlp", None)),
            "conv": self.conv.state_spec(batch, capacity),
        }

    def _convs(self) -> dict[str, ShortConv]:
        return {"conv": self.conv}

    def _run(
        self, x: Float[Array, "B T D"], state: State | None, ctx: Context
    ) -> tuple[Float[Array, "B T D"], State | None, Aux]:
        run, query, tail = self._inputs(x, state, ctx)
        hidden = None if state is None else state["hidden"]
        out, hidden = selective_scan(**run, query=query, state=hidden)
        y = self._output(x, out, run["value"])
        return y, None if state is None else {"hidden": hidden, "conv": tail}, Aux()

    def _begin(
        self, x: Float[Array, "B T D"], ctx: Context, before: State | None
    ) -> tuple[Transition, Any]:
        run, query, _ = self._inputs(x, before, ctx)
        tail = run_tail(self.value(x), ctx, self.config.conv - 1)
        # The rates are the layer's, and no part of a stretch.
        tokens = {name: a for name, a in run.items() if name != "rate"}
        return {"hidden": selective_transition(**run), "conv": tail}, (x, tokens, query)

    def _end(
        self, ctx: Context, work: Any, state: State | None
    ) -> tuple[Float[Array, "B T D"], Aux]:
        x, tokens, query = work
        hidden = None if state is None else state["hidden"]
        rate = jnp.exp(self.log_rate[...].astype(jnp.float32))
        out, _ = selective_scan(**tokens, rate=rate, query=query, state=hidden)
        return self._output(x, out, tokens["value"]), Aux()

    def _inputs(
        self, x: Float[Array, "B T D"], state: State | None, ctx: Context
    ) -> tuple[dict[str, Any], Array, State | None]:
        """Arguments of the scan, its query, and the convolution's tail after the call."""
        before = None if state is None else state["conv"]
        u, tail, _ = self.conv(self.value(x), before, ctx)
        u = jax.nn.silu(u)
        steps, key, query = self.step_in(u), self.key(u), self.query(u)
        if self.config.inner_norm:
            steps, key = self.step_norm(steps), self.key_norm(key)
            query = self.query_norm(query)
        steps = self.step(steps).astype(jnp.float32) + self.step_bias[...].astype(jnp.float32)
        run = {
            "value": u,
            "step": jax.nn.softplus(steps),
            "rate": jnp.exp(self.log_rate[...].astype(jnp.float32)),
            "key": key,
            "starts": ctx.starts,
            "valid": ctx.valid,
        }
        return run, query, tail

    def _output(self, x: Float[Array, "B T D"], out: Array, u: Array) -> Float[Array, "B T D"]:
        y = out + self.skip[...].astype(out.dtype) * u
        return self.output(y * jax.nn.silu(self.gate(x)))
