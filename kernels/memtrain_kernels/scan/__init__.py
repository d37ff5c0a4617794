"""Linear recurrences with a matrix for a state: the gated delta rule and what it contains."""

from memtrain_kernels.scan.api import (
    DeltaTransition,
    gated_delta,
    gated_delta_transition,
)


__all__ = ["DeltaTransition", "gated_delta", "gated_delta_transition"]
