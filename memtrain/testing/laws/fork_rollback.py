"""Law 9: fork and rollback give back what was, where offered."""

from __future__ import annotations

import jax
import numpy as np

from memtrain.testing.bench import Bench
from memtrain.testing.cases import halves
from memtrain.testing.report import Outcome
from memtrain.testing.subject import Subject
from memtrain.testing.tolerances import Judge


def check(bench: Bench) -> Outcome:
    judge = Judge("fork_rollback")
    subject = bench.subject()
    _check_fork(judge, subject)
    slack = subject.memory.rollback_slack
    if slack:
        for tokens in {1, min(3, slack), min(halves(bench.length)[1], slack)}:
            _check_rollback(judge, subject, tokens)
    else:
        judge.outcome.notes.append("rollback not offered")
        try:
            subject.memory.rollback(subject.init(), 1)
        except ValueError:
            return judge.outcome
        raise judge.broken("rollback past the slack of 0", "state", "was not refused: ValueError")
    return judge.outcome


def _check_fork(judge: Judge, subject: Subject) -> None:
    first = halves(subject.length)[0]
    x, ctx = subject.x, subject.ctx
    _, state = subject.run((first,), x[:, :first], ctx.window(0, first))
    before = jax.tree.map(np.array, state)
    rows = np.array([2, 0, 0, 7, 1, 4, 5, 5])
    forked = subject.jit(lambda m, s, r: m.fork(s, r))(subject.memory, state, rows)
    case = f"fork of rows {rows.tolist()}"
    pick = lambda leaf: np.asarray(leaf)[rows]  # noqa: E731
    judge.same_bits(case, forked, jax.tree.map(pick, before))
    rest = ctx.window(first, subject.length)
    want, want_state = subject.run((subject.length - first,), x[:, first:], rest, state)
    taken = jax.tree.map(pick, (rest.positions, rest.starts, rest.valid, rest.token_ids))
    there = type(rest)(*taken, tables=rest.tables)
    got, got_state = subject.run(
        (subject.length - first,), np.asarray(x)[rows, first:], there, forked
    )
    judge.close(case + ", gone on", got, pick(want), where=np.asarray(there.valid))
    judge.close(
        case + ", gone on, final state",
        subject.live(got_state),
        jax.tree.map(pick, subject.live(want_state)),
    )
    judge.same_bits(case + ", the original", state, before)


def _check_rollback(judge: Judge, subject: Subject, tokens: int) -> None:
    """What is taken back begins a document, on rows where all of it is valid: the others would lose
    tokens from before it."""
    first = halves(subject.length)[0]
    full = subject.layout.valid[:, :tokens].all(axis=1)
    x, ctx = subject.x, subject.ctx
    _, before = subject.run((first,), x[:, :first], ctx.window(0, first))
    again = x[:, :tokens], ctx.window(0, tokens)
    want, after = subject.run((1,) * tokens, *again, before)
    back = subject.jit(lambda m, s: m.rollback(s, tokens))(subject.memory, after)
    case = f"rollback of {tokens} tokens"
    rows = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf)[full], tree)  # noqa: E731
    judge.same_bits(case, rows(subject.live(back)), rows(subject.live(before)))
    got, after_again = subject.run((1,) * tokens, *again, back)
    judge.close(case + ", gone on", got[full], want[full])
    judge.close(
        case + ", gone on, final state", rows(subject.live(after_again)), rows(subject.live(after))
    )
