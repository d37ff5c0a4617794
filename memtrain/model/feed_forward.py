"""SwiGLU feed-forward (Shazeer 2020): W_out (silu(W_gate x) * W_in x)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from flax import nnx
from jaxtyping import Array, Float

from memtrain.description import BuildContext, LayerDescription, at_least
from memtrain.memory.primitives import Linear


@dataclass(frozen=True)
class SwiGLUConfig(LayerDescription):
    """Description of `SwiGLU`."""

    label = "swiglu"
    split = ("hidden",)

    hidden: int | None = None
    """Hidden units; 8/3 of the width, rounded up to a multiple of 64, unless given."""

    def __post_init__(self):
        at_least(self, "", {"hidden": 1})

    def build(self, context: BuildContext, *, rngs: nnx.Rngs) -> SwiGLU:
        return SwiGLU(self, context, rngs=rngs)


def hidden_units(dim: int) -> int:
    """8/3 of the width, rounded up to a multiple of 64: as many parameters as 4 widths ungated."""
    return -(-8 * dim // (3 * 64)) * 64


class SwiGLU(nnx.Module):
    """Gated feed-forward layer without bias. Keeps no state: it is no memory."""

    def __init__(self, config: SwiGLUConfig, context: BuildContext, *, rngs: nnx.Rngs):
        dim = context.dim
        hidden = config.hidden or hidden_units(dim)
        more = {"dtypes": context.dtypes, "rngs": rngs}
        self.gate = Linear(dim, hidden, axes=("embed", "mlp"), **more)
        self.input = Linear(dim, hidden, axes=("embed", "mlp"), **more)
        out_scale = (2 * context.depth) ** -0.5
        self.output = Linear(hidden, dim, axes=("mlp", "embed"), scale=out_scale, **more)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.output(jax.nn.silu(self.gate(x)) * self.input(x))
