"""Law 4: invalid tokens change no state and no valid output."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from memtrain.memory.protocol import Context
from memtrain.testing.bench import Bench
from memtrain.testing.cases import Layout, halves
from memtrain.testing.report import Outcome
from memtrain.testing.subject import Subject
from memtrain.testing.tolerances import Judge


def check(bench: Bench) -> Outcome:
    judge = Judge("padding")
    subject = bench.subject()
    rng = np.random.default_rng(bench.seed)
    x, layout = _with_junk(subject, rng)
    ctx = layout.context(subject.tables)
    for cut in (None, halves(bench.length), (1,) * bench.length):
        calls = "state=None" if cut is None else f"calls of {list(cut)} tokens"
        case = f"junk in the padding, {calls}"
        y, state = subject.run(cut)
        moved, moved_state = subject.run(cut, x, ctx)
        judge.same_bits(case, moved, y, where=layout.valid)
        judge.same_bits(case + ", final state", moved_state, state)
    _check_call_of_padding(judge, subject, x, ctx)
    _check_without_padding(judge, subject)
    return judge.outcome


def _with_junk(subject: Subject, rng: np.random.Generator) -> tuple[jnp.ndarray, Layout]:
    """The same batch, with anything at all where it is invalid."""
    layout, pad = subject.layout, ~subject.layout.valid
    draw = lambda old, new: np.where(pad, new, old).astype(old.dtype)  # noqa: E731
    junk = dataclasses.replace(
        layout,
        positions=draw(layout.positions, rng.integers(-5, 2**31 - 1, pad.shape)),
        starts=draw(layout.starts, rng.random(pad.shape) < 0.5),
        token_ids=draw(layout.token_ids, rng.integers(0, 97, pad.shape)),
    )
    x = np.array(subject.x)
    x[pad] = 1e3 * rng.normal(size=(int(pad.sum()), x.shape[-1]))
    return jnp.asarray(x), junk


def _check_call_of_padding(judge: Judge, subject: Subject, x: jnp.ndarray, ctx: Context) -> None:
    """A call without one valid token leaves the state as it was, bit for bit."""
    first = halves(subject.length)[0]
    _, state = subject.run((first,), subject.x[:, :first], subject.ctx.window(0, first))
    for n in (1, first):
        nothing = dataclasses.replace(
            ctx.window(0, n),
            valid=np.zeros((x.shape[0], n), bool),  # type: ignore[arg-type]
        )
        _, after = subject.run((n,), x[:, :n], nothing, state)
        judge.same_bits(f"a call of {n} invalid tokens", after, state)


def _check_without_padding(judge: Judge, subject: Subject) -> None:
    """A padded row answers like the same tokens without padding."""
    layout, T = subject.layout, subject.length
    shift = np.where(layout.valid.any(1), layout.valid.argmax(1), 0)
    # Rolled to the left end: what was padded on the left is now padded on the right only.
    index = (np.arange(T) + shift[:, None]) % T
    roll = lambda a: np.take_along_axis(a, index, axis=1)  # noqa: E731
    rolled = Layout(**{f.name: roll(getattr(layout, f.name)) for f in dataclasses.fields(layout)})
    x = np.take_along_axis(np.asarray(subject.x), index[..., None], axis=1)
    whole, state = subject.run((T,))
    want = np.take_along_axis(whole, index[..., None], axis=1)
    y, after = subject.run((T,), jnp.asarray(x), rolled.context(subject.tables))
    judge.close("padding moved from left to right", y, want, where=rolled.valid)
    judge.close(
        "padding moved from left to right, final state", subject.live(after), subject.live(state)
    )
