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
from memtrain_kernels.context import Layout, context_attention
from memtrain_kernels.decode import paged_attention, quantize_pages
from memtrain_kernels.lookup import (
    NO_ROW,
    GatherCost,
    KeyedValues,
    RowGradients,
    TopKAttention,
    gather_costs,
    memory_topk,
    merge_row_gradients,
    partitioned_product_key_topk,
    partitioned_weighted_gather,
    product_key_topk,
    sharded_memory_topk,
    sharded_weighted_gather,
    tables_over,
    topk_attention,
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
    "GatherCost",
    "KeyedValues",
    "Layout",
    "RowGradients",
    "TopKAttention",
    "attention",
    "backend_counts",
    "capabilities",
    "compiling_for",
    "context_attention",
    "explain",
    "gather_costs",
    "last_backend",
    "memory_topk",
    "merge",
    "merge_row_gradients",
    "paged_attention",
    "partitioned",
    "partitioned_product_key_topk",
    "partitioned_weighted_gather",
    "product_key_topk",
    "quantize_pages",
    "resolve_backend",
    "sharded_memory_topk",
    "sharded_weighted_gather",
    "tables_over",
    "topk_attention",
    "weighted_gather",
    "weighted_gather_row_gradients",
]
