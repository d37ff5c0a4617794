"""Law 7: a sequence sharded over devices equals the serial one, where transitions are offered."""

from memtrain.testing.bench import Bench
from memtrain.testing.report import Outcome
from memtrain.testing.tolerances import Judge


def check(bench: Bench) -> Outcome:
    outcome = Judge("context_parallel").outcome
    if hasattr(bench.subject().memory, "transition"):
        outcome.status = "not checked"
        outcome.notes.append("transitions are offered, and this version has no check of them")
    else:
        outcome.status = "not offered"
        outcome.notes.append("no transition(x, ctx)")
    return outcome
