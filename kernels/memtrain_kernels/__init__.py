"""Array kernels for models that remember: attention, decoding, lookup. Depends on jax alone."""

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
from memtrain_kernels.decode import paged_attention, quantize_pages
from memtrain_kernels.lookup import (
    NO_ROW,
    RowGradients,
    memory_topk,
    merge_row_gradients,
    product_key_topk,
    sharded_memory_topk,
    weighted_gather,
    weighted_gather_row_gradients,
)
from memtrain_kernels.partition import partitioned
from memtrain_kernels.target import compiling_for


__all__ = [
    "BACKENDS",
    "NO_ROW",
    "AttentionSpec",
    "Explanation",
    "RowGradients",
    "attention",
    "backend_counts",
    "capabilities",
    "compiling_for",
    "explain",
    "last_backend",
    "memory_topk",
    "merge",
    "merge_row_gradients",
    "paged_attention",
    "partitioned",
    "product_key_topk",
    "quantize_pages",
    "resolve_backend",
    "sharded_memory_topk",
    "weighted_gather",
    "weighted_gather_row_gradients",
]
