"""Attention over sequences that are sharded over devices: rings, exchanges of heads, layouts."""

from memtrain_kernels.context.api import (
    STRATEGIES,
    Strategy,
    context_attention,
    plan_ring,
    ulysses_degree,
)
from memtrain_kernels.context.layout import KINDS, Kind, Layout
from memtrain_kernels.context.work import RingWork, ring_work


__all__ = [
    "KINDS",
    "STRATEGIES",
    "Kind",
    "Layout",
    "RingWork",
    "Strategy",
    "context_attention",
    "plan_ring",
    "ring_work",
    "ulysses_degree",
]
