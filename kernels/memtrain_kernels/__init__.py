"""Array kernels for models that remember: attention and memory lookup. Depends on jax alone."""

from memtrain_kernels.attention import (
    BACKENDS,
    AttentionSpec,
    attention,
    backend_counts,
    last_backend,
    merge,
    resolve_backend,
)
from memtrain_kernels.lookup import product_key_topk, weighted_gather


__all__ = [
    "BACKENDS",
    "AttentionSpec",
    "attention",
    "backend_counts",
    "last_backend",
    "merge",
    "product_key_topk",
    "resolve_backend",
    "weighted_gather",
]
