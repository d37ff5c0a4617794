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
length. g[t] = -exp(A) softplus(a[t] + bias), b and w are sigmoids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from memtrain.description import BuildContext, LayerDescription, at_least
from memtrain.memory.matrix import MatrixMemory, MatrixShape, draw_decay
from memtrain.memory.primitives import Linear, RMSNorm
from memtrain.memory.short_conv import ShortConvConfig


@dataclass(frozen=True)
class GatedDeltaConfig(LayerDescription):
    """Description of `GatedDelta`; as it stands, Gated DeltaNet."""

    split = ("num_heads", "num_key_heads")

    num_heads: int = 4
    """Matrices, each with decay, erasing and writing of its own."""
    num_key_heads: int | None = None
    """Fewer than `num_heads` shares queries and keys among several; as many unless given."""
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

    @property
    def shape(self) -> MatrixShape:
        return MatrixShape(
            num_heads=self.num_heads,
            num_key_heads=self.num_key_heads or self.num_heads,
            key_dim=self.head_dim,
            value_dim=self.value_dim or self.head_dim,
        )

    def build(self, context: BuildContext, *, rngs: nnx.Rngs) -> GatedDelta:
        return GatedDelta(self, context, rngs=rngs)


class GatedDelta(MatrixMemory):
    """The gated delta rule."""

    def __init__(self, config: GatedDeltaConfig, context: BuildContext, *, rngs: nnx.Rngs):
        conv = None if config.conv is None else ShortConvConfig(config.conv)
        super().__init__(config.shape, conv, context, rngs=rngs)
        self.config = config
        H, K, V = config.num_heads, config.head_dim, config.shape.value_dim
        linear = lambda *dims, axes=("embed", "heads"), scale=1.0: Linear(  # noqa: E731
            *dims, axes=axes, dtypes=context.dtypes, rngs=rngs, scale=scale
        )
        into = lambda numbers: linear(context.dim, numbers)  # noqa: E731
        if config.decay == "head":
            self.decay = into(H)
        elif config.decay == "channel":
            # Through as few numbers as a head has channels, as in Kimi Linear.
            self.decay_in = linear(context.dim, K, axes=("embed", None))
            self.decay = linear(K, H * K, axes=(None, "heads"))
        if config.decay is not None:
            numbers = H if config.decay == "head" else H * K
            self.step_bias, self.log_rate = draw_decay(numbers, H, context.dtypes.params, rngs)
        if config.erase is not None:
            self.erase_gate = into(H if config.erase == "head" else H * K)
        if config.write in ("head", "channel"):
            self.write_gate = into(H if config.write == "head" else H * V)
        if config.gate is not None:
            self.gate = into(H * V)
        self.norm = RMSNorm(V, dtypes=context.dtypes, epsilon=context.norm_epsilon)
        out_scale = (2 * context.depth) ** -0.5
        self.output = linear(H * V, context.dim, axes=("heads", "embed"), scale=out_scale)

    def _control(self, x: Float[Array, "B T D"], parts: dict[str, Array]) -> dict[str, Any]:
        config = self.config
        if config.unit_keys:
            parts["query"], parts["key"] = _unit(parts["query"]), _unit(parts["key"])
        control: dict[str, Any] = {"log_decay": self._log_decay(x)}
        if config.erase is not None:
            most = 2 if config.negative else 1
            control["erase"] = most * self._share(self.erase_gate(x), config.erase)
        if config.write == "tied":
            control["write"] = control["erase"]
        elif config.write is not None:
            control["write"] = self._share(self.write_gate(x), config.write)
        return control

    def _share(self, a: Array, of: str) -> Array:
        """In 0..1, [B, T, H] or [B, T, H, channels]."""
        a = jax.nn.sigmoid(a.astype(jnp.float32))
        return a if of == "head" else a.reshape(*a.shape[:2], self.config.num_heads, -1)

    def _log_decay(self, x: Float[Array, "B T D"]) -> Array | None:
        """g, [B, T, H] or [B, T, H, K]."""
        if self.config.decay is None:
            return None
        a = self.decay(x if self.config.decay == "head" else self.decay_in(x))
        step = jax.nn.softplus(a.astype(jnp.float32) + self.step_bias[...].astype(jnp.float32))
        rate = jnp.exp(self.log_rate[...].astype(jnp.float32))
        if self.config.decay == "head":
            return -rate * step
        return -rate[:, None] * step.reshape(*step.shape[:2], self.config.num_heads, -1)

    def _output(
        self, x: Float[Array, "B T D"], out: Float[Array, "B T H V"], value: Array
    ) -> Float[Array, "B T D"]:
        y = self.norm(out).reshape(*x.shape[:2], -1)
        if self.config.gate is not None:
            act = jax.nn.silu if self.config.gate == "silu" else jax.nn.sigmoid
            y = y * act(self.gate(x))
        return self.output(y)


def _unit(x: Array) -> Array:
    """x / |x| over the last dimension, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
