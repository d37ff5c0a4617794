"""Law 1: any cut of the sequence into calls gives the same outputs and the same final state."""

import jax
import numpy as np

from memtrain.testing.bench import BFLOAT16, Bench
from memtrain.testing.cases import CALL_LENGTHS, FEW_CALL_LENGTHS, draw_cut, halves
from memtrain.testing.report import Outcome
from memtrain.testing.subject import Subject
from memtrain.testing.tolerances import Judge


def check(bench: Bench) -> Outcome:
    judge = Judge("split")
    T = bench.length
    rng = np.random.default_rng(bench.seed)
    cuts = [halves(T), halves(T)[::-1], (1,) * T]
    lengths, count = (CALL_LENGTHS, 20) if bench.slow else (FEW_CALL_LENGTHS, 3)
    drawn = [draw_cut(rng, T, lengths) for _ in range(count)]
    check_cuts(judge, bench.subject(), [(T,), *cuts, *drawn])
    check_cuts(judge, bench.subject(BFLOAT16), [(T,), *cuts] if bench.slow else cuts[:2])
    check_aux(judge, bench.subject())
    return judge.outcome


def check_cuts(judge: Judge, subject: Subject, cuts: list[tuple[int, ...]]) -> None:
    """Outputs against `state=None` on the whole, final states against that of the first cut."""
    dtype, valid = subject.dtypes.compute, subject.layout.valid
    outputs, _ = subject.run(None)
    state = None
    for cut in cuts:
        case = f"{dtype}, calls of {list(cut)} tokens"
        y, after = subject.run(cut)
        judge.close(case, y, outputs, dtype, where=valid)
        live = subject.live(after)
        state = live if state is None else state
        judge.close(case + ", final state", live, state, dtype)


def check_aux(judge: Judge, subject: Subject) -> None:
    """What is reported has one structure, whether a state is carried or not."""
    ctx = subject.layout.context(subject.tables, want_metrics=True, want_reads=True)
    report = lambda state: jax.eval_shape(  # noqa: E731
        lambda memory, x, state, ctx: memory(x, state, ctx)[2],
        subject.memory,
        subject.x,
        state,
        ctx,
    )
    without, with_state = report(None), report(subject.init())
    judge.require(
        jax.tree.structure(without) == jax.tree.structure(with_state)
        and jax.tree.leaves(without) == jax.tree.leaves(with_state),
        "one call, with a state or without",
        "aux",
        f"{with_state} where {without} is right",
    )
