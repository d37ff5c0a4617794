"""Law 3: after a document boundary, not one bit depends on the document before it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from memtrain.testing.bench import Bench
from memtrain.testing.cases import BATCH, halves
from memtrain.testing.report import Outcome
from memtrain.testing.subject import Subject
from memtrain.testing.tolerances import Judge


PERTURBATION = 1e3
"""Factor on the perturbed inputs: large, and finite."""


def check(bench: Bench) -> Outcome:
    judge = Judge("reset")
    subject = bench.subject()
    layout, T = subject.layout, bench.length
    every_earlier = layout.earlier_documents
    first = layout.valid & (layout.documents == 0) & (layout.documents.max(1, keepdims=True) > 0)
    rng = np.random.default_rng(bench.seed)
    for which, perturbed in (("all earlier documents", every_earlier), ("the first", first)):
        x = np.array(subject.x)
        x[perturbed] = PERTURBATION * rng.normal(size=(int(perturbed.sum()), bench.dim))
        later = layout.valid & ~perturbed
        for cut in (None, halves(T), (1,) * T):
            calls = "state=None" if cut is None else f"calls of {list(cut)} tokens"
            case = f"perturbed {which}, {calls}"
            y, state = subject.run(cut)
            moved, moved_state = subject.run(cut, jnp.asarray(x, subject.x.dtype))
            judge.require(
                bool(np.any(moved[perturbed] != y[perturbed])), case, "output", "did not move"
            )
            judge.same_bits(case, moved, y, where=later)
            if cut is not None:
                judge.same_bits(case, subject.live(moved_state), subject.live(state))
    only_last = np.where(layout.last_document[..., None], subject.cotangent, 0)
    gradient = np.asarray(subject.gradient(only_last)["input"])
    judge.zero("gradient of the last document", {"input": gradient}, where=every_earlier)
    _check_whole_rows(judge, subject)
    return judge.outcome


def _check_whole_rows(judge: Judge, subject: Subject) -> None:
    """`reset(mask)` gives `init_state` where asked, and touches no other row."""
    _, state = subject.run((subject.length,))
    mask = np.arange(BATCH) % 3 == 0
    reset = subject.jit(lambda m, s, mask: m.reset(s, mask, subject.capacity))
    after = reset(subject.memory, state, mask)
    case = f"reset of rows {np.flatnonzero(mask).tolist()}"
    judge.same_bits(case, _rows(after, mask), _rows(subject.init(), mask))
    judge.same_bits(case, _rows(after, ~mask), _rows(state, ~mask))


def _rows(state, mask: np.ndarray):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[mask], state)
