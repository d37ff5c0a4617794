"""GatedDelta: a matrix for each head that maps keys to values, and is corrected as it is written.

    S[t] = (I - k[t] (b[t] * k[t])^T) diag(exp(g[t])) S[t-1] + k[t] (w[t] * v[t])^T
    y[t] = W_o (norm(S[t]^T q[t]) * gate(x[t]))

What a key held is erased before the new value is written (the delta rule; Schlag et al. 2021, arXiv
2102.11174), and everything fades as each token decides. One general form (Gated DeltaNet 2, arXiv
2605.22791), whose restrictions are known by names of their own:

    DeltaNet                  b = w a number a head, no decay         2406.06484
    Gated DeltaNet            b = w a number a head, g one a head     2412.06464
    Kimi Delta Attention      b = w a number a head, g by channel     2510.26692
    gated linear attention    nothing erased, g by channel            2312.06635

q, k and v are convolved over a few tokens (`ShortConv`) and go through SiLU; q and k have unit
length. g[t] = -exp(A) softplus(a[t] + bias), b and w are sigmoids. Arithmetic is
`memtrain_kernels.gated_delta`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from memtrain.description import BuildContext, LayerDescription, at_least
from memtrain.memory.primitives import Linear, RMSNorm
from memtrain.memory.protocol import Aux, Context, LeafSpec, Memory, State, Transition
from memtrain.memory.short_conv import ShortConv, ShortConvConfig
from memtrain.memory.tail import join_tails, run_tail
from memtrain.parallel.recurrence import over_stretches
from memtrain_kernels import DeltaTransition, gated_delta, gated_delta_transition


PARTS = ("query", "key", "value")
LEAST_STEP, MOST_STEP = 1e-3, 1e-1
"""softplus(bias), drawn log-uniformly between these at the start (Gu and Dao 2023)."""


@dataclass(frozen=True)
class GatedDeltaConfig(LayerDescription):
    """Description of `GatedDelta`; as it stands, Gated DeltaNet."""

    num_heads: int = 4
    """States, each with decay, erasing and writing of its own."""
    num_key_heads: int | None = None
    """Fewer than `num_heads` shares queries and keys among several states; as many unless given."""
    head_dim: int = 64
    """Of queries and keys."""
    value_dim: int | None = None
    """Of a head's values; `head_dim` unless given."""
    decay: Literal["head", "channel"] | None = "head"
    """What g is a number of: a head, or a key channel of it. None keeps everything."""
    erase: Literal["head", "channel"] | None = "head"
    """What b is a number of. None is linear attention: values are added up."""
    write: Literal["tied", "head", "channel"] | None = "tied"
    """What w is a number of: a head, or a value channel of it; "tied" to b. None writes all."""
    negative: bool = False
    """b up to 2, so that a state can turn round (Grazzi et al. 2024, arXiv 2411.12537)."""
    conv: int | None = 4
    """Tokens that are convolved into q, k and v, the current one included."""
    unit_keys: bool = True
    """q and k of unit length."""
    gate: Literal["silu", "sigmoid"] | None = "silu"
    """What the normed output is multiplied with, of a projection of x."""

    def __post_init__(self):
        at_least(self, "", {"num_heads": 1, "num_key_heads": 1, "head_dim": 1, "value_dim": 1})
        at_least(self, "", {"conv": 2})
        if self.num_heads % (self.num_key_heads or self.num_heads):
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_key_heads="
                f"{self.num_key_heads}"
            )
        if self.write == "tied" and self.erase != "head":
            raise ValueError(
                f'write="tied" is to erase="head", and erase={self.erase!r}: give write="head", '
                '"channel" or None'
            )
        if self.negative and self.erase is None:
            raise ValueError("negative=True is of what is erased, and erase=None erases nothing")
        if self.erase is not None and not self.unit_keys:
            raise ValueError("unit_keys=False: keys that erase must have unit length, leave it out")

    def build(self, context: BuildContext, *, rngs: nnx.Rngs) -> GatedDelta:
        return GatedDelta(self, context, rngs=rngs)


class GatedDelta(Memory):
    """The gated delta rule. Its state is a float32 matrix a head, and the convolutions' tails.

    Tokens may be sharded over devices: transitions are affine maps of the matrices.
    """

    any_layout = True

    def __init__(self, config: GatedDeltaConfig, context: BuildContext, *, rngs: nnx.Rngs):
        self.config, self.dtypes = config, context.dtypes
        self.num_heads, self.key_dim = config.num_heads, config.head_dim
        self.num_key_heads = config.num_key_heads or config.num_heads
        self.value_dim = config.value_dim or config.head_dim
        H, K, V, dim = self.num_heads, self.key_dim, self.value_dim, context.dim
        widths = {"query": self.num_key_heads * K, "key": self.num_key_heads * K, "value": H * V}
        linear = lambda *dims, axes=("embed", "heads"), scale=1.0: Linear(  # noqa: E731
            *dims, axes=axes, dtypes=context.dtypes, rngs=rngs, scale=scale
        )
        for part, width in widths.items():
            setattr(self, part, linear(dim, width))
            if config.conv is not None:
                inner = dataclasses.replace(context, dim=width)
                conv = ShortConv(ShortConvConfig(config.conv), inner, rngs=rngs, axis="heads")
                setattr(self, f"{part}_conv", conv)
        if config.decay is not None:
            numbers = H if config.decay == "head" else H * K
            if config.decay == "channel":
                # Through as few numbers as a head has channels, as in Kimi Linear.
                self.decay_in = linear(dim, K, axes=("embed", None))
                self.decay = linear(K, numbers, axes=(None, "heads"))
            else:
                self.decay = linear(dim, numbers)
            self._draw_decay(numbers, rngs)
        if config.erase is not None:
            self.erase = linear(dim, H if config.erase == "head" else H * K)
        if config.write in ("head", "channel"):
            self.write = linear(dim, H if config.write == "head" else H * V)
        if config.gate is not None:
            self.gate = linear(dim, H * V)
        self.norm = RMSNorm(V, dtypes=context.dtypes)
        out_scale = (2 * context.depth) ** -0.5
        self.output = linear(H * V, dim, axes=("heads", "embed"), scale=out_scale)

    def _draw_decay(self, numbers: int, rngs: nnx.Rngs) -> None:
        low, high = math.log(LEAST_STEP), math.log(MOST_STEP)
        step = jnp.exp(jax.random.uniform(rngs.params(), (numbers,), minval=low, maxval=high))
        rate = jax.random.uniform(rngs.params(), (self.num_heads,), minval=1.0, maxval=16.0)
        param = lambda x: nnx.Param(x.astype(self.dtypes.params), logical_axes=("heads",))  # noqa: E731
        self.step_bias = param(step + jnp.log(-jnp.expm1(-step)))  # softplus undone
        self.log_rate = param(jnp.log(rate))

    @property
    def transition_rounds(self) -> int:  # type: ignore[override]
        """The convolutions' tails first, where there are any."""
        return 1 if self.config.conv is None else 2

    def state_spec(self, batch: int, capacity: int) -> dict[str, Any]:
        # A sum over many tokens stays float32, whatever the dtype of the activations.
        shape = (batch, self.num_heads, self.key_dim, self.value_dim)
        matrix = LeafSpec(shape, jnp.float32, ("batch", "heads", "key_dim", None))
        return {
            "matrix": matrix,
            **{name: conv.state_spec(batch, capacity) for name, conv in self._convs().items()},
        }

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None, ctx: Context
    ) -> tuple[Float[Array, "B T D"], State | None, Aux]:
        if ctx.layout.devices > 1:
            return over_stretches(self, x, state, ctx, begin=self._begin, end=self._end)
        inputs, tails = self._inputs(x, state, ctx)
        matrix = None if state is None else state["matrix"]
        out, matrix = gated_delta(**inputs, state=matrix)
        aux = self._aux(inputs, ctx)
        return self._output(x, out), None if state is None else {"matrix": matrix, **tails}, aux

    def transition(
        self, x: Float[Array, "B T D"], ctx: Context, before: State | None
    ) -> Transition:
        """{"matrix": `DeltaTransition`}, and the convolutions' tails."""
        return self._begin(x, ctx, before)[0]

    def _begin(
        self, x: Float[Array, "B T D"], ctx: Context, before: State | None
    ) -> tuple[Transition, tuple[Array, dict[str, Any], Aux]]:
        inputs, _ = self._inputs(x, before, ctx)
        run = {name: value for name, value in inputs.items() if name != "query"}
        tails = {
            name: run_tail(getattr(self, name.removesuffix("_conv"))(x), ctx, conv.size - 1)
            for name, conv in self._convs().items()
        }
        transition = {"matrix": gated_delta_transition(**run), **tails}
        return transition, (x, inputs, self._aux(inputs, ctx))

    def _end(
        self, work: tuple[Array, dict[str, Any], Aux], state: State
    ) -> tuple[Float[Array, "B T D"], Aux]:
        x, inputs, aux = work
        return self._output(x, gated_delta(**inputs, state=state["matrix"])[0]), aux

    def _inputs(
        self, x: Float[Array, "B T D"], state: State | None, ctx: Context
    ) -> tuple[dict[str, Any], dict[str, State]]:
        """Arguments of `gated_delta`, and the convolutions' tails after the call."""
        (B, T, _), config = x.shape, self.config
        heads = lambda a, n: a.reshape(B, T, n, -1)  # noqa: E731
        parts, tails = {}, {}
        for part in PARTS:
            a = getattr(self, part)(x)
            if config.conv is not None:
                name = f"{part}_conv"
                before = None if state is None else state[name]
                a, tails[name], _ = getattr(self, name)(a, before, ctx)
            parts[part] = jax.nn.silu(a)
        query, key = (heads(parts[part], self.num_key_heads) for part in ("query", "key"))
        if config.unit_keys:
            query, key = _unit(query), _unit(key)
        inputs: dict[str, Any] = {
            "query": query,
            "key": key,
            "value": heads(parts["value"], self.num_heads),
            "log_decay": self._log_decay(x),
            "erase": None,
            "write": None,
            "starts": ctx.starts,
            "valid": ctx.valid,
        }
        number = lambda a, of: a if of in ("head", "tied") else heads(a, self.num_heads)  # noqa: E731
        if config.erase is not None:
            erase = jax.nn.sigmoid(self.erase(x).astype(jnp.float32))
            inputs["erase"] = number((2 if config.negative else 1) * erase, config.erase)
        if config.write == "tied":
            inputs["write"] = inputs["erase"]
        elif config.write is not None:
            write = jax.nn.sigmoid(self.write(x).astype(jnp.float32))
            inputs["write"] = number(write, config.write)
        return inputs, tails

    def _log_decay(self, x: Float[Array, "B T D"]) -> Array | None:
        """g, [B, T, H] or [B, T, H, K]."""
        if self.config.decay is None:
            return None
        a = self.decay(x if self.config.decay == "head" else self.decay_in(x))
        step = jax.nn.softplus(a.astype(jnp.float32) + self.step_bias[...].astype(jnp.float32))
        rate = jnp.exp(self.log_rate[...].astype(jnp.float32))
        if self.config.decay == "head":
            return -rate * step
        return -rate[:, None] * step.reshape(*step.shape[:2], self.num_heads, self.key_dim)

    def _output(self, x: Float[Array, "B T D"], out: Float[Array, "B T H V"]) -> Array:
        y = self.norm(out).reshape(*x.shape[:2], -1)
        if self.config.gate is not None:
            act = jax.nn.silu if self.config.gate == "silu" else jax.nn.sigmoid
            y = y * act(self.gate(x))
        return self.output(y)

    def _aux(self, inputs: dict[str, Any], ctx: Context) -> Aux:
        if not ctx.want_metrics:
            return Aux()
        metrics = {}
        for name, a in (("kept", inputs["log_decay"]), ("erased", inputs["erase"])):
            if a is not None:
                a = jnp.mean((jnp.exp(a) if name == "kept" else a).reshape(*a.shape[:2], -1), -1)
                count = jnp.maximum(jnp.sum(ctx.valid), 1)
                metrics[name] = jnp.sum(jnp.where(ctx.valid, a, 0)) / count
        return Aux(metrics=metrics)

    def compose(self, first: Transition, then: Transition) -> Transition:
        """Affine maps of the matrices, one after the other."""
        tails = {name: join_tails(first[name], then[name]) for name in self._convs()}
        return {"matrix": first["matrix"].then(then["matrix"]), **tails}

    def advance(self, state: State, transition: Transition) -> State:
        matrix: DeltaTransition = transition["matrix"]
        tails = {name: join_tails(state[name], transition[name]) for name in self._convs()}
        return {"matrix": matrix.advance(state["matrix"]), **tails}

    def live_state(self, state: State) -> State:
        """The convolutions' inputs of earlier documents are set to zero."""
        live = {name: conv.live_state(state[name]) for name, conv in self._convs().items()}
        return {**state, **live}

    def _convs(self) -> dict[str, ShortConv]:
        if self.config.conv is None:
            return {}
        return {f"{part}_conv": getattr(self, f"{part}_conv") for part in PARTS}


def _unit(x: Array) -> Array:
    """x / |x| over the last dimension, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
