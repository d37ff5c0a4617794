"""Memories broken on purpose, one fault each."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding

from memtrain.description import BuildContext
from memtrain.memory.attention import Attention, AttentionConfig
from memtrain.memory.linear_recurrence import LinearRecurrence, LinearRecurrenceConfig
from memtrain.memory.primitives import Linear
from memtrain.memory.product_key import ProductKeyMemory, ProductKeyMemoryConfig
from memtrain.memory.protocol import Aux, LeafSpec, Memory
from memtrain.memory.rope import apply_rope
from memtrain.testing.subject import MakeMemory
from memtrain_kernels import Layout


FULL = AttentionConfig(num_heads=2, head_dim=8)
WINDOW = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, window=5, sink_tokens=2)
RECURRENCE = LinearRecurrenceConfig(state_dim=12, min_decay=0.2, max_decay=0.95)
KEYS = ProductKeyMemoryConfig(num_slots=64, num_heads=2, top_k=3, key_dim=8, value_dim=12)


def maker(cls: type[Memory], config: Any) -> MakeMemory:
    return lambda dtypes, rngs: cls(config, BuildContext(dim=16, dtypes=dtypes), rngs=rngs)  # type: ignore[call-arg]


class RopeOffByOne(Attention):
    """With a cache, queries are turned by one position too many."""

    def _attend(self, q, k, v, q_positions, q_documents, kv_documents, kv_positions, spec):
        if not spec.ordered:
            q = apply_rope(q, jnp.ones_like(q_positions), self.config.rope_theta or 1.0)
        return super()._attend(q, k, v, q_positions, q_documents, kv_documents, kv_positions, spec)


class StaleWindowSlot(Attention):
    """The ring's first slot keeps its first key for ever; its position moves on."""

    def _write_ring(self, state, k, v, documents, current, ctx):
        new = super()._write_ring(state, k, v, documents, current, ctx)
        occupied = (state["document"][:, 0] >= 0)[:, None, None]
        key = jnp.where(occupied, state["key"][:, 0], new["key"][:, 0])
        return {**new, "key": new["key"].at[:, 0].set(key)}


class RingOneShort(Attention):
    """The ring is one slot shorter than the window: the farthest visible token is lost."""

    def state_spec(self, batch, capacity):
        spec = super().state_spec(batch, capacity)
        short = {
            name: dataclasses.replace(leaf, shape=(batch, leaf.shape[1] - 1, *leaf.shape[2:]))
            for name, leaf in spec.items()
            if len(leaf.shape) > 1
        }
        return spec | {n: short[n] for n in ("key", "value", "position", "document")}


class UntiedTable(ProductKeyMemory):
    """Reads a table of its own where the shared one is asked for."""

    def __init__(self, config, context, *, rngs):
        super().__init__(config, context, rngs=rngs)
        shape = config.num_slots, config.value_dim
        self.own_table = nnx.Param(
            jax.random.normal(rngs.params(), shape), logical_axes=(None, None)
        )

    def __call__(self, x, state, ctx):
        own = {self.config.table: self.own_table[...]}
        return super().__call__(x, state, dataclasses.replace(ctx, tables=own))


class StoppedCarry(Attention):
    """No gradient flows through the cache, though its spec says so."""

    def __call__(self, x, state, ctx):
        return super().__call__(x, jax.lax.stop_gradient(state), ctx)


class DocumentLeak(Attention):
    """Does not see that documents begin."""

    def __call__(self, x, state, ctx):
        return super().__call__(x, state, dataclasses.replace(ctx, starts=ctx.starts & False))


class PaddingCounts(Attention):
    """The length moves on at invalid tokens as well."""

    def _append(self, state, k, v, documents, ctx):
        new = super()._append(state, k, v, documents, ctx)
        return {**new, "length": state["length"] + k.shape[1]}


class SpecLies(Attention):
    """The spec says bfloat16, the arrays are float32."""

    def state_spec(self, batch, capacity):
        spec = super().state_spec(batch, capacity)
        return spec | {"value": dataclasses.replace(spec["value"], dtype=jnp.bfloat16)}

    def init_state(self, batch, capacity):
        state = super().init_state(batch, capacity)
        return state | {"value": state["value"].astype(jnp.float32)}


class OverflowClamps(Attention):
    """Tokens past the capacity overwrite the last slot, and it is reported faithfully."""

    def _append(self, state, k, v, documents, ctx):
        new = super()._append(state, k, v, documents, ctx)
        late = new["overflow"][:, None, None]
        last_value = jnp.where(late, v[:, -1], new["value"][:, -1])
        return {**new, "value": new["value"].at[:, -1].set(last_value)}


class OverflowSilent(Attention):
    """Tokens past the capacity are dropped without a word."""

    def _append(self, state, k, v, documents, ctx):
        new = super()._append(state, k, v, documents, ctx)
        return {**new, "overflow": jnp.zeros_like(new["overflow"])}


class RollbackKeepsDocument(Attention):
    """Rolled back over a document's beginning, it still believes to be in that document."""

    def rollback(self, state, tokens):
        return {
            **super().rollback(state, tokens),
            "current_document": state["current_document"],
        }


class ForkForgets(Attention):
    """A fork keeps the lengths of the rows it was copied to."""

    def fork(self, state, rows):
        return {**super().fork(state, rows), "length": state["length"]}


class HiddenState(Attention):
    """Something drawn at construction is neither a parameter nor state."""

    def __init__(self, config, context, *, rngs):
        super().__init__(config, context, rngs=rngs)
        self.drawn = float(jax.random.normal(rngs.params(), ()))

    def __call__(self, x, state, ctx):
        y, state, aux = super().__call__(x, state, ctx)
        return y * (1.0 + 0.1 * self.drawn), state, aux


class Explodes(Attention):
    """Scores that no maximum is taken from: fine until an input is large."""

    def __call__(self, x, state, ctx):
        y, state, aux = super().__call__(x, state, ctx)
        growth = jnp.exp(jnp.clip(jnp.abs(x).max(axis=-1, keepdims=True) - 8, 0))
        return y * growth, state, aux


class GrowsMoreThanSaid(Attention):
    """A cache that grows with the capacity and calls itself fixed."""

    def state_spec(self, batch, capacity):
        spec = super().state_spec(batch, capacity)
        return {name: dataclasses.replace(leaf, growth="fixed") for name, leaf in spec.items()}


class DoesNothing(Attention):
    """Lawful, and too small to be felt."""

    def __call__(self, x, state, ctx):
        y, state, aux = super().__call__(x, state, ctx)
        return 1e-3 * y, state, aux


class RunningMean(Memory):
    """The mean of a document so far, its sum kept in the dtype of the activations."""

    def __init__(self, config, context, *, rngs):
        dim, self.dtypes = context.dim, context.dtypes
        self.value = Linear(dim, dim, axes=("embed", "mlp"), dtypes=context.dtypes, rngs=rngs)

    def state_spec(self, batch, capacity):
        dtype = jnp.dtype(self.dtypes.state)
        return {
            "sum": LeafSpec((batch, self.value.weight.shape[1]), dtype, ("batch", None)),
            "count": LeafSpec((batch, 1), dtype, ("batch", None), gradient=False),
        }

    def __call__(self, x, state, ctx):
        carried = self.init_state(x.shape[0], 1) if state is None else state

        def step(carry, token):
            v, start, valid = token
            total, count = (jnp.where(start[:, None], 0, leaf) for leaf in carry)
            total, count = total + v.astype(total.dtype), count + 1
            keep = lambda new, old: jnp.where(valid[:, None], new, old)  # noqa: E731
            carry = keep(total, carry[0]), keep(count, carry[1])
            return carry, total / count

        v = self.value(x * jnp.abs(x))
        turn = lambda a: jnp.moveaxis(a, 1, 0)  # noqa: E731
        carry = carried["sum"], jax.lax.stop_gradient(carried["count"])
        (total, count), y = jax.lax.scan(
            step, carry, (turn(v), turn(ctx.starts & ctx.valid), turn(ctx.valid))
        )
        y = x + turn(y).astype(x.dtype)
        return y, None if state is None else {"sum": total, "count": count}, Aux()


@custom_partitioning
def _more_where_sharded(x):
    return x


def _partition(mesh, arguments, result):
    sharding = NamedSharding(mesh, arguments[0].sharding.spec)
    parts = mesh.size
    return mesh, lambda x: x * (1.0 + 0.1 * (parts > 1)), sharding, (sharding,)


_more_where_sharded.def_partition(
    partition=_partition,
    infer_sharding_from_operands=lambda mesh, arguments, result: arguments[0].sharding,
    sharding_rule="b t d -> b t d",
)


class WrongOnAMesh(Attention):
    """An operation whose rule for sharded operands computes something else."""

    def __call__(self, x, state, ctx):
        y, state, aux = super().__call__(x, state, ctx)
        off = _more_where_sharded(jax.lax.stop_gradient(y)) - jax.lax.stop_gradient(y)
        return y + off, state, aux


class DeafTransition(LinearRecurrence):
    """A transition lets through what entered, though a document begins inside the run."""

    def _begin(self, x, ctx, before):
        transition, work = super()._begin(x, ctx, before)
        deaf, _ = super()._begin(x, dataclasses.replace(ctx, starts=ctx.starts & False), before)
        return {**transition, "kept": deaf["kept"]}, work


class CarryForgottenOnAMesh(LinearRecurrence):
    """A call over devices begins from empty, whatever is carried in."""

    def __call__(self, x, state, ctx):
        if state is not None and ctx.layout.devices > 1:
            state = self.init_state(x.shape[0], x.shape[1])
        return super().__call__(x, state, ctx)


class HalosForgotten(LinearRecurrence):
    """Asked once, where the convolution's tails are known only the second time."""

    transition_rounds = 1  # type: ignore[assignment]


class StretchesAsTheyLie(LinearRecurrence):
    """Takes the order of the devices for the order of the text."""

    def __call__(self, x, state, ctx):
        layout = Layout("contiguous", ctx.layout.devices)
        return super().__call__(x, state, dataclasses.replace(ctx, layout=layout, begun=None))


class ComposesBackwards(LinearRecurrence):
    """Composes a transition with what came before it as if it came after."""

    def compose(self, first, then):
        return super().compose(then, first)
