"""MatrixMemory: what memories have in common whose state is a matrix for each head.

They make queries, keys and values of x, each convolved over a few tokens and put through SiLU, and
decide how the matrix fades and what is erased; `memtrain_kernels.gated_delta` does the rest.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from memtrain.description import BuildContext
from memtrain.memory.primitives import Linear
from memtrain.memory.protocol import Aux, Context, LeafSpec, State, Transition
from memtrain.memory.recurrent import Recurrent
from memtrain.memory.short_conv import ShortConv, ShortConvConfig
from memtrain.memory.tail import run_tail
from memtrain_kernels import gated_delta, gated_delta_transition


PARTS = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class MatrixShape:
    """num_heads matrices of [key_dim, value_dim], of which so many in a row share a key head."""

    num_heads: int
    num_key_heads: int
    key_dim: int
    value_dim: int

    def width(self, part: str) -> int:
        """Of all heads together, side by side."""
        if part == "value":
            return self.num_heads * self.value_dim
        return self.num_key_heads * self.key_dim


class MatrixMemory(Recurrent):
    """Base. A subclass gives `_control` and `_output`.

    Its state is a float32 matrix a head, and the convolutions' tails. Tokens may be sharded over
    devices: transitions are affine maps of the matrices.
    """

    scanned = "matrix"

    query_scale: float | None = None
    """Queries are scaled by key_dim^-0.5 unless given."""

    query: Linear
    key: Linear
    value: Linear

    def __init__(
        self,
        shape: MatrixShape,
        conv: ShortConvConfig | None,
        context: BuildContext,
        *,
        rngs: nnx.Rngs,
    ):
        self.shape, self.dtypes = shape, context.dtypes
        self.conv_config = conv
        for part in PARTS:
            # A single head's channels are not split: they would be gathered for every product.
            split = part == "value" or shape.num_key_heads > 1
            axis = "heads" if split else None
            width = shape.width(part)
            weight = Linear(
                context.dim, width, axes=("embed", axis), dtypes=context.dtypes, rngs=rngs
            )
            setattr(self, part, weight)
            if conv is not None:
                inner = dataclasses.replace(context, dim=width)
                made = ShortConv(conv, inner, rngs=rngs, axis=axis)
                setattr(self, f"{part}_conv", made)

    def _control(self, x: Float[Array, "B T D"], parts: dict[str, Array]) -> dict[str, Any]:
        """The other arguments of `gated_delta`. parts: query and key [B, T, G, K], value [B, T, H,
        V], which may be changed."""
        raise NotImplementedError(f"{type(self).__name__} does not say what controls its matrices")

    def _output(
        self, x: Float[Array, "B T D"], out: Float[Array, "B T H V"], value: Array
    ) -> Float[Array, "B T D"]:
        """The layer's output, of what was read and the values of the tokens themselves."""
        raise NotImplementedError(f"{type(self).__name__} has no output")

    def state_spec(self, batch: int, capacity: int) -> dict[str, Any]:
        # A sum over many tokens stays float32, whatever the dtype of the activations.
        shape = (batch, self.shape.num_heads, self.shape.key_dim, self.shape.value_dim)
        matrix = LeafSpec(shape, jnp.float32, ("batch", "heads", "key_dim", None))
        return {
            "matrix": matrix,
            **{name: conv.state_spec(batch, capacity) for name, conv in self._convs().items()},
        }

    def _run(
        self, x: Float[Array, "B T D"], state: State | None, ctx: Context
    ) -> tuple[Float[Array, "B T D"], State | None, Aux]:
        inputs, tails = self._inputs(x, state, ctx)
        matrix = None if state is None else state["matrix"]
        out, matrix = gated_delta(**inputs, state=matrix, scale=self.query_scale)
        y, aux = self._output(x, out, inputs["value"]), self._aux(inputs, ctx)
        return y, None if state is None else {"matrix": matrix, **tails}, aux

    def _begin(
        self, x: Float[Array, "B T D"], ctx: Context, before: State | None
    ) -> tuple[Transition, tuple[Array, dict[str, Any]]]:
        inputs, _ = self._inputs(x, before, ctx)
        run = {n: value for n, value in inputs.items() if n != "query"}
        tails = {
            name: run_tail(getattr(self, name.removesuffix("_conv"))(x), ctx, conv.size - 1)
            for name, conv in self._convs().items()
        }
        transition = {"matrix": gated_delta_transition(**run), **tails}
        return transition, (x, inputs)

    def _end(
        self, ctx: Context, work: tuple[Array, dict[str, Any]], state: State | None
    ) -> tuple[Float[Array, "B T D"], Aux]:
        x, inputs = work
        matrix = None if state is None else state["matrix"]
        out, _ = gated_delta(**inputs, state=matrix, scale=self.query_scale)
        return self._output(x, out, inputs["value"]), self._aux(inputs, ctx)

    def _inputs(
        self, x: Float[Array, "B T D"], state: State | None, ctx: Context
    ) -> tuple[dict[str, Any], dict[str, State]]:
        """Arguments of `gated_delta`, and the convolutions' tails after the call."""
        parts, tails = {}, {}
        for part in PARTS:
            a = getattr(self, part)(x)
            if self.conv_config is not None:
                name = f"{part}_conv"
                before = None if state is None else state[name]
                a, tails[name], _ = getattr(self, name)(a, before, ctx)
            heads = self.shape.num_heads if part == "value" else self.shape.num_key_heads
            parts[part] = jax.nn.silu(a).reshape(*x.shape[:2], heads, -1)
        control = self._control(x, parts)
        return {**parts, **control, "starts": ctx.starts, "valid": ctx.valid}, tails

    def _aux(self, inputs: dict[str, Any], ctx: Context) -> Aux:
        """Means over tokens: `kept`, how much a token leaves of what there was; `erased`."""
        if not ctx.want_metrics:
            return Aux()
        metrics = {}
        for name, argument in (("kept", "log_decay"), ("erased", "erase")):
            if (a := inputs.get(argument)) is not None:
                a = jnp.exp(a) if name == "kept" else a
                a = jnp.mean(a.reshape(*a.shape[:2], -1), axis=-1)
                count = jnp.maximum(jnp.sum(inputs["valid"]), 1)
                metrics[name] = jnp.sum(jnp.where(inputs["valid"], a, 0)) / count
        return Aux(metrics=metrics)

    def _convs(self) -> dict[str, ShortConv]:
        if self.conv_config is None:
            return {}
        return {f"{part}_conv": getattr(self, f"{part}_conv") for part in PARTS}


LEAST_STEP, MOST_STEP = 1e-3, 1e-1
LEAST_RATE, MOST_RATE = 1.0, 16.0


def draw_decay(
    steps: int, rates: int, dtype: DTypeLike, rngs: nnx.Rngs, *, axis: str = "heads"
) -> tuple[nnx.Param, nnx.Param]:
    """(step_bias [steps], log_rate [rates]) of log decays -exp(log_rate) softplus(a + step_bias).

    Steps begin log-uniformly in 1e-3..1e-1, rates uniformly in 1..16 (Gu and Dao 2023; Dao and Gu
    2024).
    """
    low, high = math.log(LEAST_STEP), math.log(MOST_STEP)
    step = jnp.exp(jax.random.uniform(rngs.params(), (steps,), minval=low, maxval=high))
    rate = jax.random.uniform(rngs.params(), (rates,), minval=LEAST_RATE, maxval=MOST_RATE)
    param = lambda x: nnx.Param(x.astype(dtype), logical_axes=(axis,))  # noqa: E731
    softplus_undone = step + jnp.log(-jnp.expm1(-step))
    return param(softplus_undone), param(jnp.log(rate))
