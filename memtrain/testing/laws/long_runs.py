"""Law 10: long runs stay finite and within their declared growth; bfloat16 does not drift away."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memtrain.description import Dtypes
from memtrain.memory.protocol import Context, is_leaf_spec
from memtrain.testing.bench import BFLOAT16, Bench
from memtrain.testing.report import Outcome
from memtrain.testing.subject import Subject
from memtrain.testing.tolerances import DRIFT, Judge, named_leaves


ADVERSARIAL_WRITES = 10_000
CHUNK = 250

DRIFT_STEPS = 2**15
SHORT_DRIFT_STEPS = 2**11
"""Without `slow`."""
DRIFT_CHUNK = 256
POOL = 61
"""Distinct tokens of the drift run: few, so that each can be given its top-k margin."""


def check(bench: Bench) -> Outcome:
    judge = Judge("long_runs")
    _check_growth(judge, bench.subject())
    _check_capacity(judge, bench.subject())
    _check_adversarial(judge, bench.subject(), bench.seed)
    _check_drift(judge, bench)
    return judge.outcome


def _check_growth(judge: Judge, subject: Subject) -> None:
    """Bytes grow with the capacity as each leaf declares; nothing is allocated here."""
    small, large = 2**14, 2**15
    specs = [
        jax.tree_util.tree_flatten_with_path(
            subject.memory.state_spec(1, capacity), is_leaf=is_leaf_spec
        )[0]
        for capacity in (small, large)
    ]
    for (path, a), (_, b) in zip(*specs, strict=True):
        bound = {"fixed": a.nbytes, "per_token": 2 * a.nbytes, "per_segment": 2 * a.nbytes}
        judge.require(
            b.nbytes <= bound[b.growth],
            f"growth {b.growth} from capacity {small} to {large}",
            jax.tree_util.keystr(path),
            f"{a.nbytes} bytes became {b.nbytes}",
        )


def _check_capacity(judge: Judge, subject: Subject) -> None:
    """Within the capacity nothing overflows; past it `overflow` is set and nothing overwritten."""
    spec = subject.memory.state_spec(1, subject.capacity)
    growing = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_flatten_with_path(spec, is_leaf=is_leaf_spec)[0]
        if leaf.growth != "fixed"
    }
    # Rows that are valid throughout end exactly at the capacity; eight tokens more are too many.
    x, ctx, valid = subject.x, subject.ctx, subject.layout.valid
    full, written = subject.init(), np.zeros(len(valid), int)
    for n in (8,) * (subject.capacity // 8) + (1,) * (subject.capacity % 8):
        _, full = subject.run((n,), x[:, :n], ctx.window(0, n), full)
        written += valid[:, :n].sum(1)
    _, past = subject.run((8,), x[:, :8] + 1, ctx.window(0, 8), full)
    _, later = subject.run((1,), x[:, :1], _nothing(ctx), past)
    at_capacity = written == subject.capacity
    too_many = written + valid[:, :8].sum(1) > subject.capacity
    before, after, last = named_leaves(full), named_leaves(past), named_leaves(later)
    case = f"capacity {subject.capacity}"
    flags = [name for name in before if name.endswith("['overflow']")]
    judge.require(bool(flags) or not growing, case, "overflow", f"no such leaf beside {growing}")
    for name in flags:
        judge.require(not before[name].any(), case, name, "is set within the capacity")
        # A state of fixed size takes any number of tokens.
        right = too_many if growing else np.zeros_like(too_many)
        for calls, leaf in ((" exceeded", after[name]), (" exceeded, one call later", last[name])):
            judge.require(
                bool((leaf == right).all()), case + calls, name, f"{leaf} where {right} is right"
            )
    for name in growing:
        judge.same_array(
            case + " exceeded", name, after[name][at_capacity], before[name][at_capacity]
        )


def _nothing(ctx: Context) -> Context:
    ctx = ctx.window(0, 1)
    return dataclasses.replace(ctx, valid=np.zeros_like(ctx.valid))  # type: ignore[arg-type]


def _check_adversarial(judge: Judge, subject: Subject, seed: int) -> None:
    """Huge, tiny, constant, alternating and repeated inputs, one after the other."""
    rng = np.random.default_rng(seed)
    N, D = ADVERSARIAL_WRITES, subject.dim
    noise = rng.normal(size=(N, D))
    kind = (np.arange(N) // 50) % 6
    spike = rng.random((N, 1)) < 0.02
    signs = np.where(np.arange(N) % 2, 1.0, -1.0)[:, None]
    x = np.select(
        [kind[:, None] == k for k in range(5)],
        [
            1e4 * noise,
            np.full((N, D), 1e4),
            1e4 * signs * np.ones(D),
            np.zeros((N, D)),
            1e-30 * noise,
        ],
        np.where(spike, 1e6 * noise, noise[:1]),
    )
    starts = np.zeros(N, bool)
    starts[0] = starts[N // 2] = True
    case = f"{N} adversarial writes"
    y, state = _stream(subject, x, starts, CHUNK)
    judge.finite(case, {"output": y})
    judge.finite(case + ", final state", state)
    for name, leaf in named_leaves(state).items():
        if name.endswith("['overflow']"):
            judge.require(not leaf.any(), case, name, "is set within the capacity")


def _check_drift(judge: Judge, bench: Bench) -> None:
    steps = DRIFT_STEPS if bench.slow else SHORT_DRIFT_STEPS
    exact, rounded = bench.subject(Dtypes()), bench.subject(BFLOAT16)
    rng = np.random.default_rng(bench.seed)
    # Drawn in bfloat16, so that both runs read the same numbers and margins are wide enough.
    pool = np.asarray(rounded.x.astype(jnp.float32))[rounded.layout.valid][:POOL]
    x = pool[rng.integers(0, len(pool), steps)]
    starts = np.arange(steps) == 0
    want, _ = _stream(exact, x, starts, DRIFT_CHUNK)
    got, _ = _stream(rounded, x, starts, DRIFT_CHUNK)
    case = f"bfloat16 against float32 over {steps} steps"
    judge.finite(case, {"output": got})
    for name, tokens in (("all", slice(None)), ("the last", slice(-DRIFT_CHUNK, None))):
        a, b = got[tokens].astype(np.float64), want[tokens].astype(np.float64)
        drift = float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))
        judge.require(
            drift <= DRIFT, case, f"output, {name} tokens", f"relative {drift:.2g} > {DRIFT}"
        )
        judge.outcome.worst = max(judge.outcome.worst, drift / DRIFT)
    if not bench.slow:
        judge.outcome.notes.append(f"drift over {steps} steps; {DRIFT_STEPS} with slow=True")


def _stream(
    subject: Subject, x: np.ndarray, starts: np.ndarray, chunk: int
) -> tuple[np.ndarray, Any]:
    """One row of many tokens through a scan over calls of `chunk` tokens: outputs [N, D], state."""
    N = len(x)
    calls = N // chunk
    first = np.maximum.accumulate(np.where(starts, np.arange(N), 0))
    per_call = lambda a: jnp.asarray(a).reshape(calls, 1, chunk, *a.shape[1:])  # noqa: E731
    inputs = (
        per_call(x).astype(subject.dtypes.compute),
        per_call((np.arange(N) - first).astype(np.int32)),
        per_call(starts),
        per_call(np.arange(N, dtype=np.int32) % 97),
    )

    def program(memory, tables, inputs):
        def body(state, call):
            x, positions, starts, token_ids = call
            valid = jnp.ones_like(starts)
            y, state, _ = memory(x, state, Context(positions, starts, valid, token_ids, tables))
            return state, y[0]

        return jax.lax.scan(body, memory.init_state(1, N), inputs)

    state, y = subject.jit(program)(subject.memory, subject.tables, inputs)
    return np.asarray(y).reshape(N, -1), state
