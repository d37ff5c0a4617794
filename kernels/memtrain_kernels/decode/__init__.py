"""Decoding: attention of a few queries over a paged KV cache."""

from memtrain_kernels.decode.api import paged_attention
from memtrain_kernels.decode.backends import backend_counts, last_backend, resolve_backend
from memtrain_kernels.decode.quantize import quantize_pages


__all__ = [
    "backend_counts",
    "last_backend",
    "paged_attention",
    "quantize_pages",
    "resolve_backend",
]
