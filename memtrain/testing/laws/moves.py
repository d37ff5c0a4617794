"""Before all laws: the memory moves its block's output, or they would prove nothing."""

from memtrain.testing.bench import Bench
from memtrain.testing.report import Outcome
from memtrain.testing.tolerances import LEAST_MOVE, Judge


def check(bench: Bench) -> Outcome:
    judge = Judge("moves")
    why = bench.subject().assert_moves()
    judge.require(
        why is None, "a whole batch", "output", f"{why}; at least {LEAST_MOVE}: scale its weights"
    )
    return judge.outcome
