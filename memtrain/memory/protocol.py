"""The Memory protocol: one call that trains, prefills and decodes, and one explicit state.

    y, state, aux = memory(x, state, ctx)

T = the whole sequence trains, T = a chunk prefills, T = 1 decodes. `state=None` means "from empty,
and I want none back". The laws that every memory keeps are in `memtrain.testing`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from memtrain.description import TableSpec
from memtrain.errors import BadInput
from memtrain_kernels import Layout


# Tree mode: modules are plain pytrees, so jax's own transforms apply and nothing is shared or
# updated behind our back (flax FLIP 5310).
nnx.set_graph_mode(False)
nnx.set_graph_updates(False)

State = Any
"""A pytree of arrays of static shape, each with the batch as its first dimension."""

Transition = Any
"""A pytree of arrays, each with the batch first: what a run of tokens does to any state."""

Growth = Literal["fixed", "per_token", "per_segment"]
Residency = Literal["device", "host"]


class MemoryTable(nnx.Variable):
    """A table of learned memory rows: its own optimizer group, never weight-decayed."""


class Statistic(nnx.Variable):
    """A running statistic: saved with the model, not trained."""


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """One array of a memory's state, declared before anything is allocated."""

    shape: tuple[int, ...]
    dtype: DTypeLike
    axes: tuple[str | None, ...]
    """Logical axis of each dimension (see `memtrain.parallel.sharding`)."""
    growth: Growth = "fixed"
    """How the bytes grow with the capacity."""
    residency: Residency = "device"
    gradient: bool = True
    """Whether gradients may flow through this leaf when the state is carried."""
    fill: float = 0
    """Value of every element in the empty state."""

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"LeafSpec: {len(self.shape)} dims but {len(self.axes)} axes")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def spec_bytes(spec: Any) -> int:
    """Bytes of all leaves of a state spec."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(spec, is_leaf=is_leaf_spec))


def is_leaf_spec(node: Any) -> bool:
    return isinstance(node, LeafSpec)


def map_spec(function, spec: Any, *rest: Any) -> Any:
    """`jax.tree.map` over the `LeafSpec`s of a state spec."""
    return jax.tree.map(function, spec, *rest, is_leaf=is_leaf_spec)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What a memory may know about its tokens, besides their activations.

    positions: position of each token in its document, given by the caller and never derived from T;
      strictly increasing inside a document.
    starts: a document begins at this token.
    valid: real tokens, one contiguous run in each row; the others change nothing.
    token_ids: for memories that hash ids; may be None.
    tables: the shared tables of the model, by name.
    taps: tables named here are constants, whose reads are reported; to what is read from one, its
      tap, zeros of the same shape, is added if there is one (see `memtrain.memory.table`).
    begun: how many documents have begun in this call up to each token, itself included, in natural
      order; counted from `starts` where it is None, which a model does once for all its layers.
    layout: the order of the tokens in the arrays, where they are sharded over devices: memories
      that look at neighbours, or count along the row, ask it (`running_count`).
    """

    positions: Int[Array, "B T"]
    starts: Bool[Array, "B T"]
    valid: Bool[Array, "B T"]
    token_ids: Int[Array, "B T"] | None = None
    tables: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    taps: Mapping[str, Array | None] | None = None
    begun: Int[Array, "B T"] | None = None
    layout: Layout = dataclasses.field(default=Layout(), metadata={"static": True})
    want_metrics: bool = dataclasses.field(default=False, metadata={"static": True})
    """Ask for `Aux.metrics`."""
    want_reads: bool = dataclasses.field(default=False, metadata={"static": True})
    """Ask for `Aux.reads`: what was read, by slot and weight."""

    @classmethod
    def of_documents(cls, batch: int, length: int, **more: Any) -> Context:
        """One document in each row, from its beginning, every token valid."""
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        return cls(
            positions=positions,
            starts=positions == 0,
            valid=jnp.ones((batch, length), bool),
            **more,
        )

    def window(self, begin: int, end: int) -> Context:
        """The context of tokens `begin` to `end`: what the call on that piece is given."""
        assert self.layout.is_natural, "rows that are split over devices are not cut again"
        cut = lambda a: None if a is None else a[:, begin:end]  # noqa: E731
        return dataclasses.replace(
            self,
            begun=None,
            positions=cut(self.positions),
            starts=cut(self.starts),
            valid=cut(self.valid),
            token_ids=cut(self.token_ids),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TableRead:
    """The rows of a table that one layer read, and by how much: [B, T, K]; slot -1 is no row."""

    slots: Int[Array, "B T K"]
    weights: Float[Array, "B T K"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Aux:
    """What a call reports besides its output. Static in structure for a given Context."""

    losses: dict[str, Array] = dataclasses.field(default_factory=dict)
    """Added to the training loss."""
    metrics: dict[str, Array] = dataclasses.field(default_factory=dict)
    """Scalars, averaged over calls."""
    reads: dict[str, Array] = dataclasses.field(default_factory=dict)
    """What was read, on request, all [B, T, K]: "weights" float32, and int32 "slots" of a table, or
    "positions" and "documents" of tokens (-1: nothing)."""
    table_reads: dict[str, TableRead] = dataclasses.field(default_factory=dict)
    """What was read of each table, where `Context.taps` asks."""


class Memory(nnx.Module):
    """Base of all memories. See the module's docstring for the call."""

    rollback_slack: int = 0
    """Newest tokens that `rollback` can take back; 0 where it is not offered."""

    any_layout: bool = False
    """Whether a call serves every `ctx.layout`, be it by transitions, by a ring, by halos, or since
    no token needs another. Without it a call takes tokens in natural order only."""

    transition_rounds: int = 0
    """How often `transition` must be asked until it is exact; 0 where it is not offered.

    1: a transition depends on its run alone. 2: it also reads the tail of the tokens before, as a
    convolution in front does; asked once it gives the tails, and asked again with these, the rest.
    """

    def state_spec(self, batch: int, capacity: int) -> Any:
        """A pytree of `LeafSpec`. capacity: valid tokens since init or a whole-row reset."""
        raise NotImplementedError(f"{type(self).__name__} declares no state_spec")

    def init_state(self, batch: int, capacity: int) -> State:
        """The empty state. May read parameters; a reset writes this, not zeros."""
        return map_spec(
            lambda leaf: jnp.full(leaf.shape, leaf.fill, leaf.dtype),
            self.state_spec(batch, capacity),
        )

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None, ctx: Context
    ) -> tuple[Float[Array, "B T D"], State | None, Aux]:
        raise NotImplementedError(f"{type(self).__name__} has no call")

    def table_specs(self) -> dict[str, TableSpec]:
        """The shared tables that the memory reads from `ctx.tables`."""
        return {}

    def live_state(self, state: State) -> State:
        """The state with everything that no future token can feel set to a fixed value, and slots
        in (document, position) order: what the split law compares.
        """
        return state

    def reset(self, state: State, mask: Bool[Array, "B"], capacity: int) -> State:
        """Rows where `mask` holds become empty."""
        empty = self.init_state(mask.shape[0], capacity)
        pick = lambda e, s: jnp.where(mask.reshape(-1, *[1] * (s.ndim - 1)), e, s)  # noqa: E731
        return jax.tree.map(pick, empty, state)

    def fork(self, state: State, rows: Int[Array, "N"]) -> State:
        """Row i of the result is a copy of row `rows[i]`."""
        return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), state)

    def rollback(self, state: State, tokens: int) -> State:
        """The state before the newest `tokens` valid tokens of each row, up to `rollback_slack`."""
        raise ValueError(f"{type(self).__name__} offers no rollback")

    def transition(
        self, x: Float[Array, "B T D"], ctx: Context, before: State | None
    ) -> Transition:
        """What a run of consecutive tokens does to any state that enters it.

        A pytree of arrays, the batch first, of shapes that do not depend on T. Where a document
        begins inside the run, nothing that entered is left of what it replaces: sums and products
        restart there, they are never differenced. A run without valid tokens changes no state.

        ctx: in natural order. before: the state that enters, of which only tails are read (see
        `transition_rounds`); None is the empty one.
        """
        raise ValueError(f"{type(self).__name__} offers no transitions")

    def compose(self, first: Transition, then: Transition) -> Transition:
        """The transition of `first` followed by `then`. Associative."""
        raise ValueError(f"{type(self).__name__} offers no transitions")

    def advance(self, state: State, transition: Transition) -> State:
        """The state after the run: what the call on it would have given back."""
        raise ValueError(f"{type(self).__name__} offers no transitions")

    def selection_margin(
        self, x: Float[Array, "B T D"], state: State | None, ctx: Context
    ) -> Float[Array, "B T"] | None:
        """By how much the worst score that a token selects beats the best that it leaves.

        None where nothing is selected. For the laws: next to a tie, rounding decides what is read.
        """
        return None


def token_documents(
    current: Int[Array, "B"], ctx: Context
) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """The running document number of each token (-1 where invalid), and the one at the end.

    Packed ids restart in every row, so documents are told apart by a counter that the state
    carries.
    """
    begun = documents_begun(ctx)
    documents = current[:, None] + begun
    return jnp.where(ctx.valid, documents, -1), current + jnp.max(begun, axis=1)


def documents_begun(ctx: Context) -> Int[Array, "B T"]:
    """`ctx.begun`, counted where nobody has."""
    return running_count(ctx.starts & ctx.valid, ctx) if ctx.begun is None else ctx.begun


def running_count(flags: Bool[Array, "B T"], ctx: Context) -> Int[Array, "B T"]:
    """How many of the flags hold up to each token, itself included, in natural order."""
    count = jnp.cumsum(ctx.layout.restore(flags), axis=1, dtype=jnp.int32)
    return ctx.layout.arrange(count)


def raise_on_overflow(state: Any) -> None:
    """Raises BadInput if any row of any memory was given more tokens than its capacity.

    state: of one memory, or any tree of them (a model's). For hosts: it waits for the device.
    """
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        if getattr(path[-1], "key", None) == "overflow" and (
            rows := jnp.flatnonzero(leaf).tolist()
        ):
            raise BadInput(
                f"memory state{jax.tree_util.keystr(path[:-1])}: rows {rows} were given more "
                "tokens than their capacity; make the state with a larger capacity, or reset the "
                "rows"
            )
