"""Attention: one function, several backends. Its public names are at the package's top."""

from memtrain_kernels.attention.api import attention
from memtrain_kernels.attention.backends import (
    BACKENDS,
    backend_counts,
    last_backend,
    resolve_backend,
)
from memtrain_kernels.attention.merge import merge
from memtrain_kernels.attention.spec import AttentionSpec


__all__ = [
    "BACKENDS",
    "AttentionSpec",
    "attention",
    "backend_counts",
    "last_backend",
    "merge",
    "resolve_backend",
]
