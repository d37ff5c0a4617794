"""Attention over sequences that are sharded over devices: rings, exchanges of heads, layouts."""

from memtrain_kernels.context.api import (
    STRATEGIES,
    Strategy,
    context_attention,
    plan_ring,
    ulysses_degree,
)
from memtrain_kernels.context.layout import KINDS, Kind, Layout


__all__ = [
    "KINDS",
    "STRATEGIES",
    "Kind",
    "Layout",
    "Strategy",
    "context_attention",
    "plan_ring",
    "ulysses_degree",
]
