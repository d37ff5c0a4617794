"""Recurrent: what memories have in common that carry a scan's state and tails of convolutions.

A subclass makes, of a run of tokens, its transition and what its outputs come from once the state
that enters is known. The rest is the same for all: a run on one device, stretches of a sequence on
several, transitions that follow each other.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Array, Float

from memtrain.memory.protocol import Aux, Context, Memory, State, Transition
from memtrain.memory.short_conv import ShortConv
from memtrain.memory.tail import join_tails
from memtrain.parallel.recurrence import over_stretches


class Recurrent(Memory):
    """Base. A subclass gives `_begin`, `_end`, and `_run` where one call does both at less cost.

    Its state is a dict: `scanned`, a float32 array, and the tail of each of `_convs`.
    """

    any_layout = True

    scanned: ClassVar[str]
    """Name of the scan's state, and in a transition of what becomes of it: an object with `then`
    and `advance`, unless a subclass says otherwise (`_follow`, `_advance`)."""

    def _convs(self) -> Mapping[str, ShortConv]:
        """The convolutions in front of the scan, by the names of their tails in the state."""
        return {}

    def _begin(
        self, x: Float[Array, "B T D"], ctx: Context, before: State | None
    ) -> tuple[Transition, Any]:
        """The transition of a run, and the work that is left. before: for tails only."""
        raise NotImplementedError(f"{type(self).__name__} does not say how a run begins")

    def _end(
        self, ctx: Context, work: Any, state: State | None
    ) -> tuple[Float[Array, "B T D"], Aux]:
        """The outputs of a run, its work done from the state that enters."""
        raise NotImplementedError(f"{type(self).__name__} does not say how a run ends")

    def _run(
        self, x: Float[Array, "B T D"], state: State | None, ctx: Context
    ) -> tuple[Float[Array, "B T D"], State | None, Aux]:
        """A call whose tokens are all here."""
        transition, work = self._begin(x, ctx, state)
        y, aux = self._end(ctx, work, state)
        return y, None if state is None else self.advance(state, transition), aux

    def _follow(self, first: Transition, then: Transition) -> dict[str, Any]:
        """What becomes of the scan's state in two runs, one after the other."""
        return {self.scanned: first[self.scanned].then(then[self.scanned])}

    def _advance(self, state: State, transition: Transition) -> Array:
        """The scan's state after a run."""
        return transition[self.scanned].advance(state[self.scanned])

    @property
    def transition_rounds(self) -> int:  # type: ignore[override]
        """The convolutions' tails first, where there are any."""
        return 2 if self._convs() else 1

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None, ctx: Context
    ) -> tuple[Float[Array, "B T D"], State | None, Aux]:
        if ctx.layout.devices > 1:
            end = functools.partial(self._end, ctx)
            return over_stretches(self, x, state, ctx, begin=self._begin, end=end)
        return self._run(x, state, ctx)

    def transition(
        self, x: Float[Array, "B T D"], ctx: Context, before: State | None
    ) -> Transition:
        """What a run does to the scan's state, and the convolutions' tails."""
        return self._begin(x, ctx, before)[0]

    def compose(self, first: Transition, then: Transition) -> Transition:
        tails = {name: join_tails(first[name], then[name]) for name in self._convs()}
        return {**self._follow(first, then), **tails}

    def advance(self, state: State, transition: Transition) -> State:
        tails = {name: join_tails(state[name], transition[name]) for name in self._convs()}
        return {self.scanned: self._advance(state, transition), **tails}

    def live_state(self, state: State) -> State:
        """The convolutions' inputs of earlier documents are set to zero."""
        live = {name: conv.live_state(state[name]) for name, conv in self._convs().items()}
        return {**state, **live}
