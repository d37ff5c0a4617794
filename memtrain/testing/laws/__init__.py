"""The laws, one file each: `check(bench) -> Outcome`, or LawBroken."""

from memtrain.testing.laws import (
    context_parallel,
    fork_rollback,
    gradient,
    long_runs,
    moves,
    padding,
    reset,
    save_restore,
    sharding,
    size,
    split,
)


LAWS = {
    "moves": moves.check,
    "split": split.check,
    "gradient": gradient.check,
    "reset": reset.check,
    "padding": padding.check,
    "bytes": size.check,
    "sharding": sharding.check,
    "context_parallel": context_parallel.check,
    "save_restore": save_restore.check,
    "fork_rollback": fork_rollback.check,
    "long_runs": long_runs.check,
}
