"""Attention as a memory: its state is the KV cache.

Full causal attention keeps every token (growth per token). With a window it keeps a ring of the
last `window` tokens and, if asked, the first `sink_tokens` of the current document (Xiao et al.
2024): a constant footprint however long the stream.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from memtrain.description import BuildContext, LayerDescription, above_zero, at_least
from memtrain.memory.primitives import Linear, RMSNorm
from memtrain.memory.protocol import (
    Aux,
    Context,
    LeafSpec,
    Memory,
    State,
    running_count,
    token_documents,
)
from memtrain.memory.ring import in_order, ring_slots, write_tokens
from memtrain.memory.rope import apply_rope
from memtrain.memory.short_conv import ShortConv, ShortConvConfig
from memtrain.parallel.config import MeshConfig
from memtrain_kernels import BACKENDS, AttentionSpec, attention
from memtrain_kernels.context import ulysses_degree


@dataclass(frozen=True)
class AttentionConfig(LayerDescription):
    """Description of `Attention`."""

    split = ("num_heads", "num_kv_heads")

    num_heads: int = 4
    num_kv_heads: int | None = None
    """Fewer than `num_heads` shares each key-value head among several queries (GQA; 1 is MQA)."""
    head_dim: int | None = None
    """The model's width over `num_heads`, unless given."""
    window: int | None = None
    """A token sees this many positions, its own included; None sees the whole document."""
    sink_tokens: int = 0
    """The first tokens of a document that stay visible outside the window."""
    rope_theta: float | None = 10_000.0
    """Base of the rotary frequencies; None leaves positions out."""
    rotary_dim: int | None = None
    """Channels of a head that are rotated, the first; all of them unless given."""
    qk_norm: bool = True
    """RMS norm of every query and key head (Henry et al. 2020; Dehghani et al. 2023)."""
    key_conv: int | None = None
    """A depthwise causal convolution mixes this many tokens into every key, its own included (So et
    al. 2021; Olsson et al. 2022 on smeared keys)."""
    induction_init: bool = False
    """Start as induction heads: the key projection equal to the query's and `key_conv` a shift by
    one token, so that a token attends to what followed its like before. Training goes on from
    there (docs/results/recall-early.md says what it is worth)."""
    soft_cap: float | None = None
    """Scores become cap * tanh(score / cap) (Gemma 2)."""
    output_gate: bool = False
    """What the heads read is multiplied with the sigmoid of a projection of x, a number a channel
    (Qiu et al. 2025, arXiv 2505.06708; Qwen3-Next)."""
    backend: str | None = None
    """Kernel backend by name; chosen for the device unless given."""

    def __post_init__(self):
        at_least(self, "", {"num_heads": 1, "num_kv_heads": 1, "head_dim": 1, "sink_tokens": 0})
        at_least(self, "", {"key_conv": 2})
        above_zero(self, "", "soft_cap")
        above_zero(self, "", "rope_theta")
        if self.rotary_dim is not None and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise ValueError(f"rotary_dim={self.rotary_dim}: it takes an even number, 2 or more")
        if self.rotary_dim is not None and self.rope_theta is None:
            raise ValueError(f"rotary_dim={self.rotary_dim}: rope_theta=None rotates nothing")
        if self.backend is not None and self.backend not in BACKENDS:
            raise ValueError(f"backend={self.backend!r}: there are {', '.join(BACKENDS)}")
        kv_heads = self.num_kv_heads or self.num_heads
        if self.num_heads % kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of {kv_heads} kv heads")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}: a token sees at least its own position")
        if self.sink_tokens and self.window is None:
            raise ValueError("sink_tokens needs a window: without one every token stays visible")
        if self.induction_init and self.key_conv is None:
            raise ValueError("induction_init needs key_conv=2 or more: its keys are shifted by one")

    def build(self, context: BuildContext, *, rngs: nnx.Rngs) -> Attention:
        return Attention(self, context, rngs=rngs)

    @property
    def sees_whole_document(self) -> bool:
        return self.window is None

    @property
    def ring_tokens(self) -> int | None:
        """Tokens after which its caches go round; None where they keep all."""
        return None if self.window is None else self.window + self.sink_tokens

    def check_mesh(self, mesh: MeshConfig) -> None:
        if mesh.context == 1 or mesh.context_strategy not in ("ulysses", "usp"):
            return
        heads, kv_heads = self.num_heads, self.num_kv_heads or self.num_heads
        if kv_heads % mesh.tensor == 0:
            heads, kv_heads = heads // mesh.tensor, kv_heads // mesh.tensor
        ulysses_degree(mesh.context_strategy, mesh.context, heads, kv_heads, mesh.context_ulysses)


class Attention(Memory):
    """Multi-head causal attention, whose state is its KV cache.

    Arithmetic is `memtrain_kernels.attention`. Keys are stored rotated, by position in the
    document.
    """

    any_layout = True

    def __init__(self, config: AttentionConfig, context: BuildContext, *, rngs: nnx.Rngs):
        dim, dtypes = context.dim, context.dtypes
        self.config, self.dtypes = config, dtypes
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads or config.num_heads
        self.head_dim = config.head_dim or dim // config.num_heads
        if self.head_dim < 1:
            raise ValueError(f"num_heads={config.num_heads}: a width of {dim} has no more heads")
        rotary_dim = config.rotary_dim or self.head_dim
        if rotary_dim > self.head_dim:
            raise ValueError(f"rotary_dim={rotary_dim}: a head has {self.head_dim} channels")
        if config.rope_theta is not None and rotary_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even for rotary positions: give an even "
                "head_dim, other num_heads, or rope_theta=None"
            )
        query_dim, kv_dim = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        linear = lambda *dims, axes, scale=1.0: Linear(  # noqa: E731
            *dims, axes=axes, dtypes=dtypes, rngs=rngs, scale=scale
        )
        self.query = linear(dim, query_dim, axes=("embed", "heads"))
        self.key = linear(dim, kv_dim, axes=("embed", "heads"))
        self.value = linear(dim, kv_dim, axes=("embed", "heads"))
        out_scale = (2 * context.depth) ** -0.5
        self.output = linear(query_dim, dim, axes=("heads", "embed"), scale=out_scale)
        if config.key_conv is not None:
            conv = ShortConvConfig(config.key_conv, shift=config.induction_init)
            inner = dataclasses.replace(context, dim=kv_dim)
            self.key_conv = ShortConv(conv, inner, rngs=rngs, axis="heads")
        if config.induction_init:
            group = self.num_heads // self.num_kv_heads
            heads = self.query.weight[...].reshape(dim, self.num_kv_heads, group, self.head_dim)
            self.key.weight.set_value(heads[:, :, 0].reshape(dim, kv_dim))
        if config.qk_norm:
            epsilon = context.norm_epsilon
            self.query_norm = RMSNorm(self.head_dim, dtypes=dtypes, epsilon=epsilon)
            self.key_norm = RMSNorm(self.head_dim, dtypes=dtypes, epsilon=epsilon)
        if config.output_gate:
            self.output_gate = linear(dim, query_dim, axes=("embed", "heads"))

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(
            causal=True,
            window=self.config.window,
            sink_tokens=self.config.sink_tokens,
            soft_cap=self.config.soft_cap,
        )

    @property
    def rollback_slack(self) -> int:  # type: ignore[override]
        """The whole cache can be taken back where nothing is overwritten."""
        overwrites = self.config.window is not None or self.config.key_conv is not None
        return 0 if overwrites else 2**31 - 1

    def state_spec(self, batch: int, capacity: int) -> dict[str, Any]:
        window = self.config.window
        slots = capacity if window is None else min(window, capacity)
        growth = "per_token" if window is None else "fixed"
        spec: dict[str, Any] = self._cache_spec("", batch, slots, growth)
        if self.config.sink_tokens:
            spec |= self._cache_spec("sink_", batch, self.config.sink_tokens, "fixed")
        if self.config.key_conv is not None:
            spec["key_conv"] = self.key_conv.state_spec(batch, capacity)
        row = lambda dtype: LeafSpec((batch,), dtype, ("batch",), gradient=False)  # noqa: E731
        return spec | {
            "length": row(jnp.int32),  # valid tokens since init; the ring's are those without sinks
            "overflow": row(jnp.bool_),
            "current_document": row(jnp.int32),
        }

    def _cache_spec(self, prefix: str, batch: int, slots: int, growth) -> dict[str, LeafSpec]:
        content = LeafSpec(
            (batch, slots, self.num_kv_heads, self.head_dim),
            jnp.dtype(self.dtypes.state),
            ("batch", "cache", "kv_heads", "head_dim"),
            growth=growth,
        )
        index = LeafSpec(
            (batch, slots), jnp.int32, ("batch", "cache"), growth=growth, gradient=False
        )
        return {
            prefix + "key": content,
            prefix + "value": content,
            prefix + "position": index,
            # An empty slot belongs to no document: negative ids match nothing.
            prefix + "document": dataclasses.replace(index, fill=-1),
        }

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None, ctx: Context
    ) -> tuple[Float[Array, "B T D"], State | None, Aux]:
        B, T, _ = x.shape
        q, k, v, tail = self._heads(x, state, ctx)
        y, new_state = self._remember(q, k, v, state, ctx)
        if new_state is not None and tail is not None:
            new_state["key_conv"] = tail
        y = y.reshape(B, T, -1)
        if self.config.output_gate:
            y = y * jax.nn.sigmoid(self.output_gate(x))
        return self.output(y), new_state, Aux()

    def _heads(self, x, state: State | None, ctx: Context) -> tuple[Array, Array, Array, Any]:
        """Queries [B, T, H, D], keys and values [B, T, Hkv, D] as they are projected, and the
        convolution's tail."""
        B, T, _ = x.shape
        q = self.query(x).reshape(B, T, self.num_heads, self.head_dim)
        k = self.key(x)
        tail = None
        if self.config.key_conv is not None:
            k, tail, _ = self.key_conv(k, None if state is None else state["key_conv"], ctx)
        k = k.reshape(B, T, self.num_kv_heads, self.head_dim)
        return q, k, self.value(x).reshape(k.shape), tail

    def _remember(
        self, q, k, v, state: State | None, ctx: Context, **options: Any
    ) -> tuple[Any, dict[str, Any] | None]:
        """What attention gives, with these options, and the cache after the call."""
        B = q.shape[0]
        if self.config.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.config.rope_theta is not None:
            rope = self.config.rope_theta, self.config.rotary_dim
            q, k = apply_rope(q, ctx.positions, *rope), apply_rope(k, ctx.positions, *rope)
        if state is None:
            documents, _ = token_documents(jnp.zeros((B,), jnp.int32), ctx)
            spec = dataclasses.replace(self.spec, ordered=True)
            tokens = ctx.positions, documents, documents, ctx.positions
            return self._attend(q, k, v, *tokens, spec, **options), None

        documents, current = token_documents(state["current_document"], ctx)
        y = None
        if self.config.window is None:
            new_state = self._append(state, k, v, documents, ctx)
            seen = new_state
        else:
            new_state = self._write_ring(state, k, v, documents, current, ctx)
            if ctx.layout.devices > 1:
                y = self._attend_after(state, q, k, v, documents, ctx, **options)
            seen = self._seen_by_chunk(state, k, v, documents, ctx)
        new_state["current_document"] = current
        if y is None:
            y = self._attend(
                q,
                seen["key"].astype(q.dtype),
                seen["value"].astype(q.dtype),
                ctx.positions,
                documents,
                seen["document"],
                seen["position"],
                self.spec,
                **options,
            )
        return y, new_state

    def _attend(
        self, q, k, v, q_positions, q_documents, kv_documents, kv_positions, spec, **options
    ) -> Any:
        return attention(
            q,
            k,
            v,
            spec=spec,
            q_positions=q_positions,
            kv_positions=kv_positions,
            q_segments=q_documents,
            kv_segments=kv_documents,
            backend=self.config.backend,
            **options,
        )

    def _attend_after(self, state: State, q, k, v, documents, ctx: Context, **options: Any) -> Any:
        """A chunk whose tokens are sharded: the carried keys first, as a prior, then the chunk.

        The chunk by itself is in order, so that its ring sends what its window needs and no more.
        """
        prior = None
        for prefix in ("sink_", "") if self.config.sink_tokens else ("",):
            prior = self._attend(
                q,
                state[prefix + "key"].astype(q.dtype),
                state[prefix + "value"].astype(q.dtype),
                ctx.positions,
                documents,
                state[prefix + "document"],
                state[prefix + "position"],
                self.spec,
                prior=prior,
                return_lse=True,
            )
        spec = dataclasses.replace(self.spec, ordered=True)
        dtype = state["key"].dtype
        k, v = (x.astype(dtype).astype(q.dtype) for x in (k, v))
        return self._attend(
            q,
            k,
            v,
            ctx.positions,
            documents,
            documents,
            ctx.positions,
            spec,
            prior=prior,
            **options,
        )

    def _append(self, state: State, k, v, documents, ctx: Context) -> State:
        """The full cache: tokens take the next free slots; past the end they set `overflow`."""
        slots = state["key"].shape[1]
        rank = running_count(ctx.valid, ctx) - 1
        slot = jnp.where(ctx.valid, state["length"][:, None] + rank, slots)
        length = state["length"] + jnp.max(rank, axis=1) + 1
        # Written once, and only then read: XLA would fuse a single token's write into each reader,
        # which then holds a copy of the cache.
        tokens = {"key": k, "value": v, "position": ctx.positions, "document": documents}
        written = jax.lax.optimization_barrier(write_tokens(state, "", slot, tokens))
        return {**written, "length": length, "overflow": state["overflow"] | (length > slots)}

    def _seen_by_chunk(self, state: State, k, v, documents, ctx: Context) -> dict[str, Array]:
        """What the chunk's queries look at: sinks, the ring from before the chunk, the chunk."""
        new = {"key": k, "value": v, "position": ctx.positions, "document": documents}
        prefixes = ("sink_", "") if self.config.sink_tokens else ("",)
        return {
            name: jnp.concatenate(
                [*(state[p + name] for p in prefixes), leaf.astype(state[name].dtype)], axis=1
            )
            for name, leaf in new.items()
        }

    def _write_ring(self, state: State, k, v, documents, current, ctx: Context) -> State:
        """Slot = arrival number modulo the ring. Sink tokens live in slots of their own only, so
        that no key is seen twice.
        """
        ring, sinks = state["key"].shape[1], self.config.sink_tokens
        is_sink = ctx.valid & (ctx.positions < sinks)
        wanted = self.config.window or 0
        slot, length, full = ring_slots(ctx.valid & ~is_sink, state["length"], ring, wanted, ctx)
        tokens = {"key": k, "value": v, "position": ctx.positions, "document": documents}
        out = write_tokens(state, "", slot, tokens)
        if sinks:
            mine = is_sink & (documents == current[:, None])
            slot = jnp.where(mine, ctx.positions, sinks)
            out = write_tokens(out, "sink_", slot, tokens)
            alive = out["sink_document"] == current[:, None]
            out["sink_document"] = jnp.where(alive, out["sink_document"], -1)
        return {**out, "length": length, "overflow": state["overflow"] | full}

    def live_state(self, state: State) -> State:
        """Slots outside the current document are set to zero; the rest are sorted by position."""
        out = dict(state)
        if self.config.key_conv is not None:
            out["key_conv"] = self.key_conv.live_state(state["key_conv"])
        current = state["current_document"][:, None]
        for prefix in ("sink_", "") if self.config.sink_tokens else ("",):
            document = state[prefix + "document"]
            live = (document == current) & (document >= 0)
            out |= in_order(state, prefix, ("key", "value", "position", "document"), live)
        return out

    def rollback(self, state: State, tokens: int) -> State:
        """The state before the newest `tokens` tokens. Offered without a window only."""
        if tokens == 0:
            return state
        if tokens > self.rollback_slack:
            what = "ring buffer" if self.config.window is not None else "convolution"
            raise ValueError(f"a {what} has overwritten what a rollback would bring back")
        length = jnp.maximum(state["length"] - tokens, 0)
        slots = jnp.arange(state["key"].shape[1])[None, :]
        gone = slots >= length[:, None]
        first = jnp.take_along_axis(state["document"], jnp.maximum(length - 1, 0)[:, None], axis=1)
        clear = lambda leaf, fill: jnp.where(  # noqa: E731
            gone.reshape(gone.shape + (1,) * (leaf.ndim - 2)), jnp.asarray(fill, leaf.dtype), leaf
        )
        return {
            "key": clear(state["key"], 0),
            "value": clear(state["value"], 0),
            "position": clear(state["position"], 0),
            "document": clear(state["document"], -1),
            "length": length,
            "overflow": state["overflow"],
            "current_document": jnp.where(length > 0, first[:, 0], 0),
        }
