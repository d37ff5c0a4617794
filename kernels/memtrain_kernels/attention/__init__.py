"""Attention: one function, several backends. Its public names are at the package's top."""

from memtrain_kernels.attention.api import attention
from memtrain_kernels.attention.backends import (
    BACKENDS,
    backend_counts,
    capabilities,
    last_backend,
    resolve_backend,
)
from memtrain_kernels.attention.capabilities import Capabilities, Problem
from memtrain_kernels.attention.explain import Explanation, explain
from memtrain_kernels.attention.merge import merge
from memtrain_kernels.attention.spec import AttentionSpec


__all__ = [
    "BACKENDS",
    "AttentionSpec",
    "Capabilities",
    "Explanation",
    "Problem",
    "attention",
    "backend_counts",
    "capabilities",
    "explain",
    "last_backend",
    "merge",
    "resolve_backend",
]
