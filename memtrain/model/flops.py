"""FLOPs of one token, by kind: what MFU is counted from.

Causal attention counts half of the square, memory reads are counted apart, lookups in tables and
the embedding count nothing but their arithmetic. A training step is three forward passes.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from flax import nnx

from memtrain.memory.attention import Attention
from memtrain.memory.product_key import ProductKeyMemory
from memtrain.model.language_model import LanguageModel


FORMULA = "causal-half/1"
"""Changes with the way of counting, so that figures of two versions are not compared blindly."""


@dataclasses.dataclass(frozen=True)
class Flops:
    """Multiply-adds count as two. Per token of the forward pass."""

    matmul: float
    """Projections, feed-forward layers and the head."""
    attention: float
    """Scores and weighted values."""
    memory: float
    """Scores and weighted values of key-value tables."""

    @property
    def total(self) -> float:
        return self.matmul + self.attention + self.memory

    @property
    def training(self) -> float:
        return 3 * self.total


def forward_flops(model: LanguageModel, seq_len: int) -> Flops:
    """Of one token, averaged over rows of `seq_len` tokens that are one document each."""
    matmul = 2.0 * model.config.dim * model.vocab_size
    attention = memory = 0.0
    repeats = model.config.repeats
    for block in model.blocks:
        for place in block.places().values():
            layer = place.layer
            matmul += sum(2.0 * leaf.size for leaf in _matrices(layer))
            if isinstance(layer, Attention):
                seen = _mean_visible(layer.config.window, layer.config.sink_tokens, seq_len)
                attention += 4.0 * seen * layer.num_heads * layer.head_dim * repeats
            elif isinstance(layer, ProductKeyMemory):
                c = layer.config
                scores = 2.0 * c.num_heads * layer.half_slots * c.key_dim
                values = 2.0 * c.num_heads * c.top_k * c.value_dim
                memory += (scores + values) * repeats
    return Flops(matmul=matmul, attention=attention, memory=memory)


def _mean_visible(window: int | None, sinks: int, seq_len: int) -> float:
    """Keys that a query sees, averaged over the positions of a row."""
    so_far = np.arange(1, seq_len + 1)
    near = np.minimum(so_far, window or seq_len)
    return float(np.mean(near + np.minimum(sinks, so_far - near)))


def _matrices(layer: nnx.Module) -> list[jax.Array]:
    """The stacked weights of matrix products: `layers` and two dimensions."""
    return [leaf for leaf in jax.tree.leaves(layer) if leaf.ndim == 3]
