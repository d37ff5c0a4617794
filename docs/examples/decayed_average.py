"""A memory in a file of its own: an average of the past that each token decays as it decides.

a[t] = sigmoid(W_a x[t])    h[t] = a[t] h[t-1] + (1 - a[t]) W_v x[t]
y[t] = W_o (h[t] * silu(W_g x[t]))
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from memtrain.description import BuildContext, LayerDescription
from memtrain.memory import Aux, LeafSpec, Memory
from memtrain.memory.primitives import Linear


@dataclass(frozen=True)
class DecayedAverageConfig(LayerDescription):
    """Hyper-parameters: what a recipe writes, and every run and artifact keeps."""

    state_dim: int = 32

    def build(self, context: BuildContext, *, rngs) -> "DecayedAverage":
        return DecayedAverage(self, context, rngs=rngs)


class DecayedAverage(Memory):
    def __init__(self, config: DecayedAverageConfig, context: BuildContext, *, rngs):
        self.state_dim, dim, dtypes = config.state_dim, context.dim, context.dtypes
        into = lambda: Linear(dim, self.state_dim, axes=("embed", "mlp"), dtypes=dtypes, rngs=rngs)  # noqa: E731
        self.decay, self.value, self.gate = into(), into(), into()
        self.output = Linear(self.state_dim, dim, axes=("mlp", "embed"), dtypes=dtypes, rngs=rngs)

    def state_spec(self, batch, capacity):
        # A sum over many tokens stays float32, whatever the dtype of the activations.
        return {"average": LeafSpec((batch, self.state_dim), jnp.float32, ("batch", "mlp"))}

    def __call__(self, x, state, ctx):
        valid, starts = ctx.valid[..., None], ctx.starts[..., None]
        a = jax.nn.sigmoid(self.decay(x).astype(jnp.float32))
        new = (1 - a) * self.value(x).astype(jnp.float32)
        a = jnp.where(starts, 0, a)  # a document begins: nothing of the one before is left
        a, new = jnp.where(valid, a, 1), jnp.where(valid, new, 0)  # padding changes nothing

        join = lambda left, right: (left[0] * right[0], right[0] * left[1] + right[1])  # noqa: E731
        kept, h = jax.lax.associative_scan(join, (a, new), axis=1)
        if state is not None:
            h = h + kept * state["average"][:, None]
            state = {"average": h[:, -1]}
        return self.output(h.astype(x.dtype) * jax.nn.silu(self.gate(x))), state, Aux()
