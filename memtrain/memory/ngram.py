"""NGramMemory: what usually follows the last few tokens, looked up in tables by their hash.

Engram (DeepSeek 2026, arXiv 2601.07372), written from the paper's equations:

    e[t] = rows z_nk[t] of the tables, side by side, for all orders n and heads k
    v[t] = W_V e[t]        alpha[t] = sigmoid(g(RMSNorm(x[t]) . RMSNorm(W_K e[t]) / sqrt(d)))
    u[t] = alpha[t] v[t]   y[t] = SiLU(conv(RMSNorm(u))[t]) + u[t]

g is the signed root sign(s) sqrt(|s|), or nothing; conv is depthwise, causal, its taps as far apart
as the longest order. Rows are named by token ids alone (`memtrain.memory.ngram_hash`). What the
next call must know is state: the last ids, and the convolution's last inputs. Neither looks behind
a document's beginning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from memtrain.description import BuildContext, LayerDescription, TableSpec, at_least
from memtrain.memory.ngram_hash import MAX_INT32, NOTHING, NGramHash, look_back
from memtrain.memory.primitives import Linear, RMSNorm
from memtrain.memory.protocol import Aux, Context, LeafSpec, Memory, State, TableRead
from memtrain.memory.short_conv import ShortConv
from memtrain.memory.table import read_table


_LEAST_SCORE = 1e-6
"""Of |score| under the signed root: below it the root's slope would grow without bound."""


@dataclass(frozen=True)
class NGramMemoryConfig(LayerDescription):
    """Description of `NGramMemory`."""

    split = ("num_heads",)

    num_slots: int = 65_536
    """Rows for each order and head: each gets a prime number of them, the next from here on."""
    orders: tuple[int, ...] = (2, 3)
    """Lengths of the n-grams."""
    num_heads: int = 8
    """Hashes of each n-gram, by as many primes: two n-grams rarely meet in all of them."""
    head_dim: int = 32
    """Numbers in a row."""
    conv: int = 4
    """Taps of the convolution, the current token's included."""
    signed_root: bool = True
    """sigmoid(sign(s) sqrt(|s|)) as in the published code, instead of the paper's sigmoid(s)."""
    vocab_size: int | None = None
    """Token ids are below it; None takes any. A model with a larger vocabulary is refused."""
    compression: tuple[int, ...] | None = None
    """For each token id the canonical id that it is hashed by (see `ngram_hash.canonical_ids`)."""
    seed: int = 0
    """Of the hash's multipliers."""
    table: str = "ngram"
    """Name of the table. Layers that name the same table share it, and must agree on its shape."""

    def __post_init__(self):
        least = {"num_slots": 1, "num_heads": 1, "head_dim": 1, "conv": 2, "vocab_size": 1}
        at_least(self, "", least)
        distinct = len(set(self.orders)) == len(self.orders)
        if not distinct or min(self.orders, default=0) < 1 or max(self.orders) < 2:
            raise ValueError(
                f"orders={self.orders}: give different numbers of 1 or more, one of 2 or more"
            )
        if self.compression is not None:
            size = len(self.compression)
            if self.vocab_size not in (None, size):
                raise ValueError(
                    f"vocab_size={self.vocab_size}: compression has {size} ids, give as many"
                )
            if not size or min(self.compression) < 0 or max(self.compression) >= MAX_INT32:
                raise ValueError("compression: give an id of 0 or more for each token id")
        parts = len(self.orders) * self.num_heads
        if self.num_slots * parts > MAX_INT32 or self.hashing.num_rows > MAX_INT32:
            # The primes of so many parts lie within a thousandth above where they are asked for.
            raise ValueError(
                f"num_slots={self.num_slots}: {parts} such parts are more rows than int32 counts; "
                f"{int(0.999 * MAX_INT32) // parts} fit"
            )

    @property
    def hashing(self) -> NGramHash:
        """The rows of every token, for hosts too: `config.hashing.addresses(token_ids, starts)`."""
        vocab = self.vocab_size if self.compression is None else len(self.compression)
        return NGramHash(
            self.orders, self.num_heads, self.num_slots, self.seed, vocab, self.compression
        )

    def build(self, context: BuildContext, *, rngs: nnx.Rngs) -> NGramMemory:
        return NGramMemory(self, context, rngs=rngs)

    def tables(self) -> dict[str, TableSpec]:
        spec = TableSpec(num_slots=self.hashing.num_rows, value_dim=self.head_dim)
        return {self.table: spec}

    def check_vocab(self, vocab_size: int) -> None:
        """Raises ValueError for a model whose ids the hash does not take."""
        bound = self.hashing.vocab_size
        if bound is not None and vocab_size > bound:
            what = "vocab_size" if self.compression is None else "compression: number of ids"
            raise ValueError(
                f"NGramMemory {what} = {bound}: the model's tokens are 0 to {vocab_size - 1}; "
                f"give {vocab_size}"
            )


class DilatedConv(ShortConv):
    """A depthwise causal convolution of every `dilation`-th token. It begins as zero."""

    def __init__(self, taps: int, dilation: int, context: BuildContext, *, axis: str = "embed"):
        # Its tail is that of a convolution of as many neighbours as it spans.
        self.size, self.dilation = (taps - 1) * dilation + 1, dilation
        self.dim, self.dtypes, self.axis = context.dim, context.dtypes, axis
        zeros = jnp.zeros((taps, context.dim), context.dtypes.params)
        self.taps = nnx.Param(zeros, logical_axes=(None, axis))

    def _mix(self, x, inputs, owners, documents) -> Array:
        before, T = self.size - 1, x.shape[1]
        taps = self.taps[...].astype(x.dtype)
        y = x * taps[0]
        for i in range(1, taps.shape[0]):
            begin = before - i * self.dilation
            same = (owners[:, begin : begin + T] == documents)[..., None]
            tapped = inputs[:, begin : begin + T] * taps[i]
            y = y + jnp.where(same, tapped, jnp.zeros((), x.dtype))
        return y


class NGramMemory(Memory):
    """Reads a row for every order and head of the n-grams that end at a token.

    The table is `ctx.tables[config.table]`, [rows, head_dim]; `ctx.token_ids` names its rows. As
    with embeddings, rows have unit length to begin with and are read times sqrt(head_dim). State:
    the last ids of the document that goes on, int32 [B, n - 1], and the convolution's tail.

    A token id out of range counts as no token under `jit`; NumPy ids are refused with BadInput.
    """

    any_layout = True

    def __init__(self, config: NGramMemoryConfig, context: BuildContext, *, rngs: nnx.Rngs):
        dim, dtypes = context.dim, context.dtypes
        self.config, self.dtypes = config, dtypes
        self.reach = max(config.orders)
        width = len(config.orders) * config.num_heads * config.head_dim
        linear = lambda scale=1.0: Linear(  # noqa: E731
            width, dim, axes=("mlp", "embed"), dtypes=dtypes, rngs=rngs, scale=scale
        )
        self.key, self.value = linear(), linear((2 * context.depth) ** -0.5)
        epsilon = context.norm_epsilon
        self.query_norm = RMSNorm(dim, dtypes=dtypes, epsilon=epsilon)
        self.key_norm = RMSNorm(dim, dtypes=dtypes, epsilon=epsilon)
        self.conv_norm = RMSNorm(dim, dtypes=dtypes, epsilon=epsilon)
        self.conv = DilatedConv(config.conv, self.reach, context)

    def state_spec(self, batch: int, capacity: int) -> dict[str, Any]:
        shape = (batch, self.reach - 1)
        ids = LeafSpec(shape, jnp.int32, ("batch", None), gradient=False, fill=NOTHING)
        return {"ids": ids, "conv": self.conv.state_spec(batch, capacity)}

    def table_specs(self) -> dict[str, TableSpec]:
        return self.config.tables()

    def live_state(self, state: State) -> State:
        return {"ids": state["ids"], "conv": self.conv.live_state(state["conv"])}

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None, ctx: Context
    ) -> tuple[Float[Array, "B T D"], State | None, Aux]:
        slots, ids = self.addresses(None if state is None else state["ids"], ctx)
        e, table_reads = self.read(slots, ctx)
        alpha = self.gate(x, self.key(e))
        v = alpha[..., None].astype(x.dtype) * self.value(e)
        before = None if state is None else state["conv"]
        mixed, tail, _ = self.conv(self.conv_norm(v), before, ctx)
        weights = jnp.broadcast_to(alpha[..., None], slots.shape)
        reads = {"slots": slots, "weights": weights} if ctx.want_reads else {}
        metrics = {}
        if ctx.want_metrics:
            count = jnp.maximum(jnp.sum(ctx.valid), 1)
            metrics["gate"] = jnp.sum(jnp.where(ctx.valid, alpha, 0)) / count
        aux = Aux(metrics=metrics, reads=reads, table_reads=table_reads)
        return jax.nn.silu(mixed) + v, None if state is None else {"ids": ids, "conv": tail}, aux

    def addresses(
        self, before: Int[Array, "B L"] | None, ctx: Context
    ) -> tuple[Int[Array, "B T K"], Int[Array, "B L"]]:
        """The rows that each token reads (-1 where invalid), and the ids for the next call."""
        if ctx.token_ids is None:
            raise ValueError("ctx.token_ids is None: NGramMemory hashes token ids, give int [B, T]")
        hashing, layout = self.config.hashing, ctx.layout
        # In natural order all along: ids are few bytes, and neighbours may be anywhere.
        natural = lambda a: layout.restore(jnp.asarray(a))  # noqa: E731
        ids = natural(hashing.compress(ctx.token_ids, ctx.valid))
        seen, after = look_back(ids, natural(ctx.starts), natural(ctx.valid), self.reach, before)
        slots = hashing.rows(layout.arrange(seen))
        return jnp.where(jnp.asarray(ctx.valid)[..., None], slots, -1), after

    def read(
        self, slots: Int[Array, "B T K"], ctx: Context
    ) -> tuple[Float[Array, "B T E"], dict[str, TableRead]]:
        """The rows side by side: their first numbers, then their second ones, and so on."""
        B, T, K = slots.shape
        apart = slots.reshape(B, T * K, 1)
        weights = jnp.full(apart.shape, self.config.head_dim**0.5, jnp.float32)
        rows, table_reads = read_table(ctx, self.config.table, apart, weights)
        # Numbers outermost: columns of a table that is split over devices stay where they are.
        e = jnp.swapaxes(rows.reshape(B, T, K, -1), 2, 3).reshape(B, T, -1)
        return e.astype(self.dtypes.compute), table_reads

    def gate(self, x: Float[Array, "B T D"], key: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        """alpha, float32: how much of what the n-gram brings fits what the token is."""
        q, k = (
            norm(a).astype(jnp.float32) for norm, a in ((self.query_norm, x), (self.key_norm, key))
        )
        score = jnp.sum(q * k, axis=-1) * x.shape[-1] ** -0.5
        if self.config.signed_root:
            score = jnp.sign(score) * jnp.sqrt(jnp.maximum(jnp.abs(score), _LEAST_SCORE))
        return jax.nn.sigmoid(score)
