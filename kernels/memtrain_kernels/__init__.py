"""Array kernels for models that remember: attention and memory lookup. Depends on jax alone."""

from memtrain_kernels.attention import (
    BACKENDS,
    AttentionSpec,
    Explanation,
    attention,
    backend_counts,
    capabilities,
    explain,
    last_backend,
    merge,
    resolve_backend,
)
from memtrain_kernels.lookup import product_key_topk, weighted_gather
from memtrain_kernels.partition import partitioned
from memtrain_kernels.target import compiling_for


__all__ = [
    "BACKENDS",
    "AttentionSpec",
    "Explanation",
    "attention",
    "backend_counts",
    "capabilities",
    "compiling_for",
    "explain",
    "last_backend",
    "merge",
    "partitioned",
    "product_key_topk",
    "resolve_backend",
    "weighted_gather",
]
