"""ProductKeyMemory: a differentiable external key-value memory that the weights hold.

Product keys (Lample et al. 2019) with the gated output of Memory Layers at Scale (Berges et al.
2024, arXiv 2412.09764, eq. 2), written from the papers' equations:

    q = W_q x in R^{heads x d_k}, q = [q1; q2]        s_i = K_i q_i for the two half-key sets
    p = softmax over the top-k of all sums s_1[i] + s_2[j]
    y = sum over heads and top-k of p * V[i * sqrt(N) + j]
    out = W_out (y * silu(W_gate x))
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from memtrain.description import BuildContext, LayerDescription, TableSpec, at_least
from memtrain.memory.primitives import Linear, rms_normalize
from memtrain.memory.protocol import Aux, Context, Memory, State
from memtrain.memory.table import read_table
from memtrain_kernels import partitioned_product_key_lookup


@dataclass(frozen=True)
class ProductKeyMemoryConfig(LayerDescription):
    """Description of `ProductKeyMemory`."""

    split = ("num_heads", "value_dim")

    num_slots: int = 16_384
    """Rows of the value table: a square number."""
    num_heads: int = 4
    top_k: int = 16
    """Rows that each head reads for a token."""
    key_dim: int = 128
    """Width of a query or key, two halves together."""
    value_dim: int = 256
    qk_norm: bool = True
    """RMS norm of half queries and half keys: one learned temperature instead of their lengths."""
    table: str = "memory"
    """Name of the value table. Layers that name the same table share it."""

    def __post_init__(self):
        at_least(self, "", {"num_slots": 1, "num_heads": 1, "key_dim": 2, "value_dim": 1})
        root = math.isqrt(self.num_slots)
        if root * root != self.num_slots:
            raise ValueError(
                f"num_slots={self.num_slots} must be a square; "
                f"nearest {root**2} or {(root + 1) ** 2}"
            )
        if not 1 <= self.top_k <= root:
            raise ValueError(f"top_k={self.top_k} must be between 1 and sqrt(num_slots) = {root}")
        if self.key_dim % 2:
            raise ValueError(f"key_dim={self.key_dim} must be even: a key has two halves")

    def build(self, context: BuildContext, *, rngs: nnx.Rngs) -> ProductKeyMemory:
        return ProductKeyMemory(self, context, rngs=rngs)

    def tables(self) -> dict[str, TableSpec]:
        return {self.table: TableSpec(num_slots=self.num_slots, value_dim=self.value_dim)}


class ProductKeyMemory(Memory):
    """Reads `num_heads * top_k` rows of a shared value table for every token. Its state is empty.

    The table is `ctx.tables[config.table]`, `[num_slots, value_dim]`. Gradients reach the rows that
    were read, and the keys and queries through the softmax over them; the selection itself has
    none.
    """

    any_layout = True

    def __init__(self, config: ProductKeyMemoryConfig, context: BuildContext, *, rngs: nnx.Rngs):
        dim, dtypes = context.dim, context.dtypes
        self.config, self.dtypes = config, dtypes
        self.half_slots = math.isqrt(config.num_slots)
        half_dim = config.key_dim // 2
        linear = lambda *dims, axes, scale=1.0: Linear(  # noqa: E731
            *dims, axes=axes, dtypes=dtypes, rngs=rngs, scale=scale
        )
        self.query = linear(dim, config.num_heads * config.key_dim, axes=("embed", "heads"))
        bound = config.key_dim**-0.5
        keys = jax.random.uniform(
            rngs.params(),
            (2, config.num_heads, self.half_slots, half_dim),
            jnp.float32,
            -bound,
            bound,
        )
        self.keys = nnx.Param(
            keys.astype(dtypes.params), logical_axes=(None, "heads", None, "key_dim")
        )
        if config.qk_norm:
            # Unit-rms halves give scores of variance 1; a softmax over the best k wants contrast.
            scale = jnp.full((config.num_heads,), math.log(2.0), dtypes.params)
            self.log_temperature = nnx.Param(scale, logical_axes=(None,))
        self.gate = linear(dim, config.value_dim, axes=("embed", "mlp"))
        out_scale = (2 * context.depth) ** -0.5
        self.output = linear(config.value_dim, dim, axes=("mlp", "embed"), scale=out_scale)

    def state_spec(self, batch: int, capacity: int) -> dict:
        return {}

    def table_specs(self) -> dict[str, TableSpec]:
        return self.config.tables()

    def queries_and_keys(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T H 2 d"], Float[Array, "2 H N d"]]:
        """Both halves of each head's query, and the half-keys, as they are multiplied."""
        B, T, _ = x.shape
        config = self.config
        q = self.query(x).reshape(B, T, config.num_heads, 2, config.key_dim // 2)
        keys = self.keys[...]
        if config.qk_norm:
            # One norm over all of a token's heads would couple them; each half has its own.
            q = rms_normalize(q) * (config.key_dim // 2) ** -0.5
            keys = rms_normalize(keys)
        operands = jnp.dtype(self.dtypes.matmul)
        return q.astype(operands), keys.astype(operands)

    def temperature(self) -> Float[Array, "H"]:
        """What a head's scores are multiplied with."""
        if not self.config.qk_norm:
            return jnp.ones((self.config.num_heads,), jnp.float32)
        return jnp.exp(self.log_temperature[...].astype(jnp.float32))

    def select(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T HK"], Int[Array, "B T HK"]]:
        """Softmax weights and slots of what each token reads, all heads side by side."""
        B, T, _ = x.shape
        best, slots = partitioned_product_key_lookup(*self.queries_and_keys(x), self.config.top_k)
        weights = jax.nn.softmax(best * self.temperature()[:, None], axis=-1)
        return weights.reshape(B, T, -1), slots.reshape(B, T, -1)

    def selection_margin(self, x, state, ctx) -> Float[Array, "B T"]:
        """See `Memory`. Forms the scores of all slots: for tests."""
        q, keys = self.queries_and_keys(x)
        s1, s2 = jnp.einsum(
            "bthsd,shnd,h->sbthn", q, keys, self.temperature(), preferred_element_type=jnp.float32
        )
        sums = (s1[..., :, None] + s2[..., None, :]).reshape(*s1.shape[:-1], -1)
        if self.config.top_k == self.config.num_slots:
            return jnp.full(x.shape[:2], jnp.inf)
        best, _ = jax.lax.top_k(sums, self.config.top_k + 1)
        return jnp.min(best[..., -2] - best[..., -1], axis=-1)

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None, ctx: Context
    ) -> tuple[Float[Array, "B T D"], State | None, Aux]:
        weights, slots = self.select(x)
        y, table_reads = read_table(ctx, self.config.table, slots, weights)
        out = self.output(y.astype(self.dtypes.compute) * jax.nn.silu(self.gate(x)))
        reads = {"slots": slots, "weights": weights} if ctx.want_reads else {}
        # Sums over all slots: not where the table is so large that its gradient is of rows.
        asked = ctx.want_metrics and not table_reads
        metrics = self._usage(slots, weights, ctx) if asked else {}
        return out, state, Aux(metrics=metrics, reads=reads, table_reads=table_reads)

    def _usage(self, slots, weights, ctx: Context) -> dict[str, Array]:
        """How the slots are used by the valid tokens of this call.

        `slots_used`: fraction of slots read at all. `usage_kl`: KL divergence in nats of the weight
        that each slot received from uniform (0: all alike; log N: one slot takes everything).
        """
        weights = jax.lax.stop_gradient(weights) * ctx.valid[..., None]
        mass = jnp.zeros((self.config.num_slots,), jnp.float32)
        # Not flattened: each device adds up its own tokens, and only the sums are exchanged.
        mass = mass.at[slots].add(weights)
        share = mass / jnp.maximum(mass.sum(), 1e-30)
        kl = jnp.sum(jnp.where(share > 0, share * jnp.log(share * self.config.num_slots), 0.0))
        return {"slots_used": jnp.mean(mass > 0), "usage_kl": kl}
