"""Mamba2: a state space layer whose state is a matrix for each head (Dao and Gu 2024, 2405.21060).

    h[t] = exp(d[t] A) h[t-1] + d[t] B[t] x[t]^T          A < 0 and d[t] > 0, one a head
    y[t] = W_o norm((h[t]^T C[t] + D x[t]) * silu(z[t]))

x, B and C are projections of the input, convolved over a few tokens and put through SiLU; groups of
heads share B and C; d[t] = softplus(a[t] + bias). In the words of `MatrixMemory`, B is the key, C
the query and x the value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from memtrain.description import BuildContext, LayerDescription, at_least
from memtrain.memory.matrix import MatrixMemory, MatrixShape, draw_decay
from memtrain.memory.primitives import Linear, RMSNorm
from memtrain.memory.short_conv import ShortConvConfig


@dataclass(frozen=True)
class Mamba2Config(LayerDescription):
    """Description of `Mamba2`."""

    expand: int = 2
    """The inner width over the model's."""
    head_dim: int = 64
    """Channels of a head: the inner width holds as many heads as fit, and must be a multiple."""
    state_dim: int = 128
    """Numbers that the state holds for each channel."""
    num_groups: int = 1
    """Heads share B and C in so many groups."""
    norm_groups: int = 1
    """The gated output is normed in so many runs of heads; with as many as `num_groups`, as in the
    authors' code, nothing of one group depends on another."""
    conv: int = 4
    """Tokens that are convolved, the current one included."""

    def __post_init__(self):
        least = {"expand": 1, "head_dim": 1, "state_dim": 1, "num_groups": 1, "conv": 2}
        at_least(self, "", least | {"norm_groups": 1})

    def shape(self, dim: int) -> MatrixShape:
        """In a model of this width. Raises ValueError where heads or groups do not fit in it."""
        inner = self.expand * dim
        heads = inner // self.head_dim
        if heads * self.head_dim != inner or not heads:
            raise ValueError(
                f"head_dim={self.head_dim}: expand * dim = {inner} is no multiple of it"
            )
        if heads % self.num_groups:
            raise ValueError(
                f"num_groups={self.num_groups}: there are {heads} heads (expand * dim / head_dim), "
                "no multiple of it"
            )
        if heads % self.norm_groups:
            raise ValueError(
                f"norm_groups={self.norm_groups}: there are {heads} heads (expand * dim / "
                "head_dim), no multiple of it"
            )
        return MatrixShape(heads, self.num_groups, self.state_dim, self.head_dim)

    def build(self, context: BuildContext, *, rngs: nnx.Rngs) -> Mamba2:
        return Mamba2(self, context, rngs=rngs)


class Mamba2(MatrixMemory):
    """State space duality."""

    query_scale = 1.0

    def __init__(self, config: Mamba2Config, context: BuildContext, *, rngs: nnx.Rngs):
        shape, dtypes = config.shape(context.dim), context.dtypes
        super().__init__(shape, ShortConvConfig(config.conv, bias=True), context, rngs=rngs)
        self.config = config
        H, inner = shape.num_heads, shape.width("value")
        linear = lambda *dims, axes=("embed", "heads"), scale=1.0: Linear(  # noqa: E731
            *dims, axes=axes, dtypes=dtypes, rngs=rngs, scale=scale
        )
        self.step = linear(context.dim, H)
        self.step_bias, self.log_rate = draw_decay(H, H, dtypes.params, rngs)
        self.skip = nnx.Param(jnp.ones((H,), dtypes.params), logical_axes=("heads",))
        self.gate = linear(context.dim, inner)
        self.norm = RMSNorm(
            inner, dtypes=dtypes, epsilon=context.norm_epsilon, groups=config.norm_groups
        )
        out_scale = (2 * context.depth) ** -0.5
        self.output = linear(inner, context.dim, axes=("heads", "embed"), scale=out_scale)

    def _control(self, x: Float[Array, "B T D"], parts: dict[str, Array]) -> dict[str, Any]:
        a = self.step(x).astype(jnp.float32)
        step = jax.nn.softplus(a + self.step_bias[...].astype(jnp.float32))
        rate = jnp.exp(self.log_rate[...].astype(jnp.float32))
        return {"log_decay": -rate * step, "write": step}

    def _output(
        self, x: Float[Array, "B T D"], out: Float[Array, "B T H V"], value: Array
    ) -> Float[Array, "B T D"]:
        y = out + self.skip[...].astype(out.dtype)[:, None] * value
        y = y.reshape(*x.shape[:2], -1) * jax.nn.silu(self.gate(x))
        return self.output(self.norm(y))
