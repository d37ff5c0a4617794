"""A mixture of experts in a block's feed-forward place (Shazeer et al. 2017, arXiv 1701.06538).

Every token goes to the `top_k` SwiGLU experts that a router likes best, and nothing is dropped:
tokens are sorted by expert and multiplied in groups as long as they come (Gale et al. 2022,
MegaBlocks, arXiv 2211.15841). It remembers nothing between tokens; it is a `Memory` whose state is
empty, since a memory has what it needs: which tokens are valid, losses and metrics of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from memtrain.description import BuildContext, LayerDescription, at_least
from memtrain.memory.primitives import Linear
from memtrain.memory.protocol import Aux, Context, Memory, State
from memtrain.model.feed_forward import SwiGLU, SwiGLUConfig, hidden_units
from memtrain.parallel.config import MeshConfig
from memtrain.parallel.sharding import split_here
from memtrain_kernels import assign, grouped_matmul


@dataclass(frozen=True)
class MoEConfig(LayerDescription):
    """Description of `MoE`."""

    label = "moe"

    num_experts: int
    top_k: int
    """Experts that a token is sent to."""
    hidden: int | None = None
    """Hidden units of an expert; those of a `SwiGLU` unless given."""
    normalize: bool = True
    """A token's weights add up to 1 (Mixtral); otherwise they are the router's probabilities among
    all experts (Jamba)."""
    shared_hidden: int | None = None
    """Hidden units of one more expert that every token is sent to (DeepSeekMoE, arXiv 2401.06066);
    there is none unless given."""
    shared_gate: bool = False
    """The shared expert counts sigmoid(x w) (Qwen2-MoE)."""
    balance_loss: float = 0.01
    """Added to the loss: this times E sum_e f_e p_e, with f_e the share of the assignments that
    expert e gets and p_e the mean of its probability, which is 1 where all get as much (Fedus et
    al. 2021, arXiv 2101.03961)."""
    z_loss: float = 0.0
    """Added to the loss: this times the mean of the squared log-sum-exp of the router's scores
    (Zoph et al. 2022, ST-MoE, arXiv 2202.08906)."""

    parallel: Literal["hidden", "experts"] = "hidden"
    """What of the experts the mesh's tensor axis splits. Hidden units: every device has a share of
    each expert, and as much to do whatever the router chooses. Whole experts: wide products where
    experts are narrow, but a device has what its experts are sent to do, and room for all of it."""

    def __post_init__(self):
        at_least(self, "", {"num_experts": 1, "top_k": 1, "hidden": 1, "shared_hidden": 1})
        at_least(self, "", {"balance_loss": 0, "z_loss": 0})
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k}: there are {self.num_experts} experts")
        if self.shared_gate and self.shared_hidden is None:
            raise ValueError("shared_gate is of the shared expert: give shared_hidden")

    @property
    def split(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("hidden", "shared_hidden") if self.parallel == "hidden" else ("shared_hidden",)

    def check_mesh(self, mesh: MeshConfig) -> None:
        if self.parallel == "experts" and self.num_experts % mesh.tensor:
            raise ValueError(
                f"num_experts={self.num_experts}: mesh.tensor={mesh.tensor} does not divide it; "
                "parallel='hidden' splits every expert instead"
            )

    def build(self, context: BuildContext, *, rngs: nnx.Rngs) -> MoE:
        return MoE(self, context, rngs=rngs)


class MoE(Memory):
    """Routed SwiGLU experts. Its state is empty.

    On a mesh the `tensor` axis, whose devices hold the same tokens, splits the experts
    (`MoEConfig.parallel`), and what its devices make of a token is added up; no token travels. Over
    `fsdp` and `context` they are stored like all parameters, and gathered for use.
    """

    any_layout = True

    def __init__(self, config: MoEConfig, context: BuildContext, *, rngs: nnx.Rngs):
        dim, dtypes = context.dim, context.dtypes
        self.config, self.dtypes = config, dtypes
        hidden = config.hidden or hidden_units(dim)
        self.router = Linear(
            dim, config.num_experts, axes=("embed", None), dtypes=dtypes, rngs=rngs
        )

        def experts(inner: int, outer: int, axes: tuple[str, str], scale: float = 1.0) -> nnx.Param:
            shape = (config.num_experts, inner, outer)
            draw = jax.random.truncated_normal(rngs.params(), -3, 3, shape, jnp.float32)
            weights = (scale * inner**-0.5 * draw).astype(dtypes.params)
            return nnx.Param(weights, logical_axes=self._axes(*axes))

        self.gate = experts(dim, hidden, ("embed", "mlp"))
        self.input = experts(dim, hidden, ("embed", "mlp"))
        self.output = experts(hidden, dim, ("mlp", "embed"), (2 * context.depth) ** -0.5)
        if config.shared_hidden is not None:
            self.shared = SwiGLU(SwiGLUConfig(config.shared_hidden), context, rngs=rngs)
        if config.shared_gate:
            self.shared_gate = Linear(dim, 1, axes=("embed", None), dtypes=dtypes, rngs=rngs)

    def _axes(self, *axes: str | None) -> tuple[str | None, ...]:
        """Logical axes of experts' matrices, of which either experts or hidden units are split."""
        if self.config.parallel == "hidden":
            return (None, *axes)
        return ("experts", *(None if axis == "mlp" else axis for axis in axes))

    def state_spec(self, batch: int, capacity: int) -> dict:
        return {}

    def scores(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        """What the router thinks of each expert, in float32 whatever the dtypes: its small
        differences decide."""
        return jnp.matmul(
            x.astype(jnp.float32),
            self.router.weight[...].astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )

    def choose(
        self, scores: Float[Array, "B T E"]
    ) -> tuple[Float[Array, "B T K"], Int[Array, "B T K"]]:
        """Weights and experts of each token; of equals, the expert that comes first."""
        weights, experts = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), self.config.top_k)
        if self.config.normalize:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights, experts

    def selection_margin(self, x, state, ctx) -> Float[Array, "B T"]:
        """See `Memory`."""
        if self.config.top_k == self.config.num_experts:
            return jnp.full(x.shape[:2], jnp.inf)
        best, _ = jax.lax.top_k(self.scores(x), self.config.top_k + 1)
        return best[..., -2] - best[..., -1]

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None, ctx: Context
    ) -> tuple[Float[Array, "B T D"], State | None, Aux]:
        scores = self.scores(x)
        weights, experts = self.choose(scores)
        # What is not valid goes to nobody.
        y = self._experts(x, weights, jnp.where(ctx.valid[..., None], experts, -1))
        if self.config.shared_hidden is not None:
            own = self.shared(x)
            if self.config.shared_gate:
                own = own * jax.nn.sigmoid(self.shared_gate(x).astype(jnp.float32)).astype(x.dtype)
            y = y + own
        losses, metrics = self._balance(scores, experts, ctx.valid)
        reads = {"slots": experts, "weights": weights} if ctx.want_reads else {}
        return y, state, Aux(losses, metrics if ctx.want_metrics else {}, reads)

    def _experts(self, x, weights, experts) -> Float[Array, "B T D"]:
        """The weighted sum of what the chosen experts (-1: none) make of each token."""
        matrices = self.gate[...], self.input[...], self.output[...]
        run = partial(_run_experts, operand=self.dtypes.matmul, compute=self.dtypes.compute)
        split = split_here()
        if split is None:
            return run(*matrices, x, weights, experts)
        inward = split.gathered(self._axes("embed", "mlp"), matrices[0].shape)
        outward = split.gathered(self._axes("mlp", "embed"), matrices[2].shape)
        by_expert = inward[0]
        axes = by_expert or inward[2]

        def local(gate, inp, out, x, weights, experts):
            first = 0 if by_expert is None else len(gate) * jax.lax.axis_index(by_expert)
            y = run(gate, inp, out, x, weights, experts, first)
            return y if axes is None else jax.lax.psum(y, axes)

        tokens = split.tokens(x.shape)
        return jax.shard_map(
            local,
            mesh=split.mesh,
            in_specs=(inward, inward, outward, tokens, tokens, tokens),
            out_specs=tokens,
            check_vma=False,
        )(*matrices, x, weights, experts)

    def _balance(
        self, scores, experts, valid: Bool[Array, "B T"]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Losses and metrics of the valid tokens of this call, over all devices.

        Metrics: `balance` as in `MoEConfig.balance_loss`; `load_max`, the busiest expert's share of
        the assignments times the experts (1: all alike); `experts_used`, the fraction that got any;
        `router_entropy` in nats, of the mean token.
        """
        config, number = self.config, self.config.num_experts
        count = jnp.maximum(jnp.sum(valid), 1).astype(jnp.float32)
        mean = lambda a: jnp.sum(jnp.where(valid, a, 0.0)) / count  # noqa: E731
        log_p = jax.nn.log_softmax(scores, axis=-1)
        chosen = jax.nn.one_hot(experts, number, dtype=jnp.float32).sum(axis=2)
        load = jnp.sum(jnp.where(valid[..., None], chosen, 0.0), axis=(0, 1))
        load = load / (count * config.top_k)
        p = jnp.sum(jnp.where(valid[..., None], jnp.exp(log_p), 0.0), axis=(0, 1)) / count
        balance = number * jnp.sum(jax.lax.stop_gradient(load) * p)
        losses = {}
        if config.balance_loss:
            losses["balance"] = config.balance_loss * balance
        if config.z_loss:
            lse = jax.nn.logsumexp(scores, axis=-1)
            losses["z"] = config.z_loss * mean(jnp.square(lse))
        metrics = {
            "balance": balance,
            "load_max": number * jnp.max(load),
            "experts_used": jnp.mean(load > 0),
            "router_entropy": mean(-jnp.sum(jnp.exp(log_p) * log_p, axis=-1)),
        }
        return losses, jax.tree.map(jax.lax.stop_gradient, metrics)


@partial(jax.named_call, name="experts")
def _run_experts(
    gate: Float[Array, "E D F"],
    inward: Float[Array, "E D F"],
    outward: Float[Array, "E F D"],
    x: Float[Array, "B T D"],
    weights: Float[Array, "B T K"],
    experts: Int[Array, "B T K"],
    first: Array | int = 0,
    *,
    operand: str,
    compute: str,
) -> Float[Array, "B T D"]:
    """The weighted sum over the experts from `first` on that the tokens chose."""
    B, T, D = x.shape
    way = assign(experts.reshape(B * T, -1), len(gate), first)
    product = partial(grouped_matmul, operand_dtype=operand, out_dtype=compute)
    rows = way.dispatch(x.reshape(B * T, D))
    hidden = jax.nn.silu(product(rows, gate, way.sizes)) * product(rows, inward, way.sizes)
    out = product(hidden, outward, way.sizes)
    y = way.combine(out, weights.reshape(B * T, -1).astype(jnp.float32))
    return y.astype(compute).reshape(B, T, D)
