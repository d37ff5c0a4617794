"""BankMemory: attention that also looks its keys up in a bank of what it read long before.

Memorizing Transformers (Wu et al. 2022, arXiv 2203.08913): a layer writes the keys and values of
what it reads into a bank, and every query attends to its best few of them, beside a window of
local attention. Written from the paper's equations, with what training and decoding need in common:

- *What a query sees* is a matter of documents and positions. At position t, local attention sees
  (t - W, t], the bank (t - W - M, t - W] of the same document, however the text was cut into calls.
- Bank keys carry no rotary phase, and keys and queries have unit length, with a learned scale a
  head: keys of an earlier step of training are of another length, but still point the same way.
- Both results join by a learned gate a head, sigmoid(b) * bank + (1 - sigmoid(b)) * local, or under
  one softmax, through their log-sum-exp.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from memtrain.description import BuildContext, at_least
from memtrain.memory.attention import Attention, AttentionConfig
from memtrain.memory.protocol import Aux, Context, LeafSpec, State, token_documents
from memtrain.memory.ring import in_order, ring_slots, write_tokens
from memtrain.parallel.config import MeshConfig
from memtrain_kernels import KeyedValues, TopKAttention, merge, topk_attention


@dataclass(frozen=True)
class BankMemoryConfig(AttentionConfig):
    """Description of `BankMemory`: that of its local attention, and of the bank."""

    window: int | None = 512
    """Positions that local attention sees, the token's own included; the bank has those before."""
    bank_size: int = 65_536
    """Positions before the window that can be looked up."""
    top_k: int = 32
    """Bank keys that each query head reads."""
    join: Literal["gate", "softmax"] = "gate"
    """A learned gate a head (the paper's), or one softmax over bank and window."""
    gradient_tokens: int = 0
    """Keys and values of this many positions before the window are trained through the bank; of
    the rest, and by default of all, they are constants."""
    bank_dtype: Literal["state", "int8"] = "state"
    """How keys are kept: in the model's dtype of states, or in 8 bits with a scale a key."""

    def __post_init__(self):
        super().__post_init__()
        at_least(self, "", {"bank_size": 1, "top_k": 1, "gradient_tokens": 0})
        if self.window is None:
            raise ValueError("window=None: a bank begins where local attention ends, give a number")
        if self.top_k > self.bank_size:
            raise ValueError(f"top_k={self.top_k}: the bank has bank_size={self.bank_size} slots")
        if self.soft_cap is not None:
            raise ValueError(
                f"soft_cap={self.soft_cap}: a bank's scores are bounded already, leave it out"
            )
        if self.output_gate:
            raise ValueError("output_gate=True: a bank has its own gate, leave it out")
        if self.gradient_tokens > self.bank_size:
            raise ValueError(
                f"gradient_tokens={self.gradient_tokens}: the bank has bank_size={self.bank_size}"
            )
        if self.gradient_tokens and self.bank_dtype == "int8":
            raise ValueError("gradient_tokens: keys in int8 have no gradient, take state keys")

    def build(self, context: BuildContext, *, rngs: nnx.Rngs) -> BankMemory:
        return BankMemory(self, context, rngs=rngs)

    @property
    def slots(self) -> int:
        """Of the bank in full: what a query may look up, and the window's own tokens, which are
        written as they come."""
        return (self.window or 0) + self.bank_size

    @property
    def ring_tokens(self) -> int:
        return self.slots + self.sink_tokens

    def check_mesh(self, mesh: MeshConfig) -> None:
        super().check_mesh(mesh)
        if rest := self.slots % mesh.context:
            near = [self.bank_size - rest, self.bank_size - rest + mesh.context]
            fits = " or ".join(str(n) for n in near if n >= 1)
            raise ValueError(
                f"bank_size={self.bank_size}: with the window of {self.window} it cannot be split "
                f"over mesh.context={mesh.context}; nearest {fits}"
            )


@dataclass(frozen=True)
class Visible:
    """Which keys of its document a query may look up: at distances first .. last - 1, and from a
    position on, as sink tokens are seen by local attention already."""

    first: int
    last: int
    sinks: int = 0

    def __call__(self, q_pos: Array, kv_pos: Array, q_seg: Array, kv_seg: Array) -> Array:
        distance = q_pos - kv_pos
        return (distance >= self.first) & (distance < self.last) & (kv_pos >= self.sinks)

    def reaches(self, q_least: Array, q_most: Array, kv_least: Array, kv_most: Array) -> Array:
        """Whether some query of these positions may look up some key of those."""
        in_band = (q_most - kv_least >= self.first) & (q_least - kv_most < self.last)
        return in_band & (kv_most >= self.sinks)


@dataclass(frozen=True)
class Trained:
    """Which of the keys that a query read are no constants: at a distance below `before`."""

    before: int

    def __call__(self, q_pos: Array, kv_pos: Array, q_seg: Array, kv_seg: Array) -> Array:
        return q_pos - kv_pos < self.before


class BankMemory(Attention):
    """Attention to a window, and to the best `top_k` of the `bank_size` positions before it."""

    def __init__(self, config: BankMemoryConfig, context: BuildContext, *, rngs: nnx.Rngs):
        super().__init__(config, context, rngs=rngs)
        self.bank = config
        params = context.dtypes.params
        # Products of unit vectors of width D have a variance of 1 / D: to begin with, like local
        # scores, one of 1.
        scale = jnp.full((self.num_heads,), 0.5 * math.log(self.head_dim), params)
        self.log_scale = nnx.Param(scale, logical_axes=("heads",))
        if config.join == "gate":
            self.gate = nnx.Param(jnp.zeros((self.num_heads,), params), logical_axes=("heads",))

    @property
    def rollback_slack(self) -> int:  # type: ignore[override]
        return 0

    @property
    def _visible(self) -> Visible:
        window = self.config.window or 0
        return Visible(window, window + self.bank.bank_size, self.config.sink_tokens)

    def state_spec(self, batch: int, capacity: int) -> dict[str, Any]:
        spec = super().state_spec(batch, capacity)
        slots = min(self.bank.slots, capacity)
        differs = self.bank.gradient_tokens > 0
        content = LeafSpec(
            (batch, slots, self.num_kv_heads, self.head_dim),
            jnp.dtype(self.dtypes.state),
            ("batch", "cache", "kv_heads", "head_dim"),
            gradient=differs,
        )
        index = LeafSpec((batch, slots), jnp.int32, ("batch", "cache"), gradient=False)
        spec |= {
            "bank_key": content,
            "bank_value": content,
            "bank_position": index,
            "bank_document": dataclasses.replace(index, fill=-1),
            "bank_length": LeafSpec((batch,), jnp.int32, ("batch",), gradient=False),
        }
        if self.bank.bank_dtype == "int8":
            spec["bank_key"] = dataclasses.replace(content, dtype=jnp.int8)
            spec["bank_scale"] = LeafSpec(
                content.shape[:3], jnp.float32, content.axes[:3], gradient=False, fill=1
            )
        return spec

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None, ctx: Context
    ) -> tuple[Float[Array, "B T D"], State | None, Aux]:
        B, T, _ = x.shape
        q, k, v, tail = self._heads(x, state, ctx)
        local, new_state = self._remember(q, k, v, state, ctx, return_lse=True)
        start = jnp.zeros((B,), jnp.int32) if state is None else state["current_document"]
        documents, _ = token_documents(start, ctx)
        new = self._written(k, v, documents, ctx)
        bank = None
        if new_state is not None:
            assert state is not None
            if tail is not None:
                new_state["key_conv"] = tail
            new_state |= self._write_bank(state, new, new_state["overflow"], ctx)
            # One token replaces what no query sees any more: it is written in place and then read.
            bank = _bank_of(new_state if T == 1 else state)
        parts = [bank] if T == 1 else [new] if bank is None else [bank, new]
        read = self._look_up(q, [p for p in parts if p is not None], documents, ctx)
        y, share = self._join(local, read)
        aux = self._aux(read, share, documents, ctx)
        return self.output(y.astype(x.dtype).reshape(B, T, -1)), new_state, aux

    def _written(self, k, v, documents: Int[Array, "B T"], ctx: Context) -> KeyedValues:
        """The call's tokens as the bank keeps them."""
        k, scale = _unit(k), None
        if self.bank.bank_dtype == "int8":
            k, scale = _to_int8(jax.lax.stop_gradient(k))
        else:
            k = k.astype(self.dtypes.state)
        return KeyedValues(k, v.astype(self.dtypes.state), ctx.positions, documents, scale)

    def _write_bank(self, state: State, new: KeyedValues, overflow, ctx: Context) -> dict[str, Any]:
        ring = state["bank_position"].shape[1]
        slot, length, full = ring_slots(ctx.valid, state["bank_length"], ring, self.bank.slots, ctx)
        names = _LEAVES if new.scales is not None else _LEAVES[:-1]
        own = {name: leaf for name, leaf in state.items() if name.startswith("bank_")}
        tokens: dict[str, Any] = dict(zip(names, new, strict=False))
        written = jax.lax.optimization_barrier(write_tokens(own, "bank_", slot, tokens))
        return {**written, "bank_length": length, "overflow": overflow | full}

    def _bank_queries(self, q: Float[Array, "B T H D"]) -> Float[Array, "B T H D"]:
        """Of unit length times the learned scale of their head, so that products are scores."""
        return _unit(q) * jnp.exp(self.log_scale[...].astype(jnp.float32))[:, None]

    def _look_up(
        self, q, parts: list[KeyedValues], documents: Int[Array, "B T"], ctx: Context
    ) -> TopKAttention:
        """What the bank answers; older parts come first."""
        q = self._bank_queries(q)
        if not parts:
            weights = jnp.zeros((*q.shape[:3], self.bank.top_k))
            lse = jnp.full(q.shape[:3], -jnp.inf)
            return TopKAttention(
                jnp.zeros_like(q), lse, weights, jnp.full(weights.shape, -1, jnp.int32)
            )
        trained = self.bank.gradient_tokens
        return topk_attention(
            q,
            parts,
            self.bank.top_k,
            q_positions=ctx.positions,
            q_segments=documents,
            mask_fn=self._visible,
            trained_fn=Trained((self.config.window or 0) + trained) if trained else None,
        )

    def _join(self, local: Any, bank: TopKAttention) -> tuple[Array, Array]:
        """The output of both, and the bank's share of it [B, T, H]."""
        y, lse = local
        if self.bank.join == "softmax":
            out, total = merge((y, lse), (bank.out, bank.lse))
            return out, jnp.exp(bank.lse - jnp.where(jnp.isfinite(total), total, 0))
        # A token without anything in the bank is left what its window says.
        gate = jax.nn.sigmoid(self.gate[...].astype(jnp.float32))
        share = jnp.where(jnp.isfinite(bank.lse), gate, 0.0)
        return share[..., None] * bank.out + (1 - share)[..., None] * y.astype(jnp.float32), share

    def _aux(self, read: TopKAttention, share, documents, ctx: Context) -> Aux:
        metrics, reads = {}, {}
        if ctx.want_metrics:
            tokens = jnp.maximum(jnp.sum(ctx.valid), 1)
            metrics["bank_share"] = jnp.sum(share * ctx.valid[..., None]) / tokens / self.num_heads
        if ctx.want_reads:
            flat = lambda a: a.reshape(*a.shape[:2], -1)  # noqa: E731
            document = jnp.where(read.positions < 0, -1, documents[:, :, None, None])
            reads = {
                "positions": flat(read.positions),
                "documents": flat(document),
                "weights": flat(read.weights * share[..., None]),
            }
        return Aux(metrics=metrics, reads=reads)

    def live_state(self, state: State) -> State:
        out = super().live_state(state)
        document = state["bank_document"]
        live = (document == state["current_document"][:, None]) & (document >= 0)
        names = ["key", "value", "position", "document"]
        names += ["scale"] if self.bank.bank_dtype == "int8" else []
        return out | in_order(state, "bank_", tuple(names), live)

    def selection_margin(self, x, state, ctx) -> Float[Array, "B T"]:
        """See `Memory`. Forms all scores: for tests."""
        q, k, v, _ = self._heads(x, None, ctx)
        documents, _ = token_documents(jnp.zeros(x.shape[:1], jnp.int32), ctx)
        new = self._written(k, v, documents, ctx)
        keys = new.keys.astype(jnp.float32)
        if new.scales is not None:
            keys = keys * new.scales[..., None]
        keys = jnp.repeat(keys, self.num_heads // self.num_kv_heads, axis=2)
        scores = jnp.einsum("bthd,bshd->bhts", self._bank_queries(q), keys)
        at = lambda a: (a[:, :, None], a[:, None])  # noqa: E731
        (q_pos, kv_pos), (q_seg, kv_seg) = at(ctx.positions), at(documents)
        seen = (q_seg == kv_seg) & (kv_seg >= 0) & self._visible(q_pos, kv_pos, q_seg, kv_seg)
        scores = jnp.where(seen[:, None], scores, -jnp.inf)
        if self.bank.top_k >= scores.shape[-1]:
            return jnp.full(x.shape[:2], jnp.inf)
        best, _ = jax.lax.top_k(scores, self.bank.top_k + 1)
        last, first_left = best[..., -2], best[..., -1]
        margin = jnp.where(jnp.isfinite(first_left), last - first_left, jnp.inf)
        return jnp.min(margin, axis=1)


_LEAVES: tuple[str, ...] = ("key", "value", "position", "document", "scale")
"""Of the state behind "bank_", as `KeyedValues` has them."""


def _bank_of(state: State) -> KeyedValues:
    return KeyedValues(*(state.get("bank_" + name) for name in _LEAVES))


def _unit(x: Array) -> Array:
    """x / |x| over the last dimension, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


def _to_int8(k: Array) -> tuple[Array, Array]:
    """Keys rounded to 255 steps of a scale of their own."""
    scale = jnp.maximum(jnp.max(jnp.abs(k), axis=-1), 1e-12) / 127
    return jnp.round(k / scale[..., None]).astype(jnp.int8), scale
