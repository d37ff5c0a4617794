"""Linear recurrences: the gated delta rule and what it contains, and the selective scan."""

from memtrain_kernels.scan.api import (
    DeltaTransition,
    gated_delta,
    gated_delta_transition,
)
from memtrain_kernels.scan.selective import (
    SelectiveTransition,
    selective_scan,
    selective_transition,
)


__all__ = [
    "DeltaTransition",
    "SelectiveTransition",
    "gated_delta",
    "gated_delta_transition",
    "selective_scan",
    "selective_transition",
]
