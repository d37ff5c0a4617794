"""FLOPs of one token, by kind: what MFU is counted from.

Causal attention counts half of the square, memory reads are counted apart, lookups in tables and
the embedding count nothing but their arithmetic. A training step is three forward passes.
"""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx

from memtrain.memory.attention import Attention
from memtrain.memory.bank import BankMemory
from memtrain.memory.gated_delta import GatedDelta
from memtrain.memory.mamba1 import Mamba1
from memtrain.memory.matrix import MatrixMemory
from memtrain.memory.ngram import NGramMemory
from memtrain.memory.product_key import ProductKeyMemory
from memtrain.model.language_model import LanguageModel
from memtrain.model.moe import MoE


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
    """Scores and weighted values of key-value tables, n-grams and banks; states that are matrices,
    as single tokens read and write them."""

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.matmul + other.matmul,
            self.attention + other.attention,
            self.memory + other.memory,
        )

    @property
    def total(self) -> float:
        return self.matmul + self.attention + self.memory

    @property
    def training(self) -> float:
        return 3 * self.total


def forward_flops(model: LanguageModel, seq_len: int) -> Flops:
    """Of one token, averaged over rows of `seq_len` tokens that are one document each."""
    total = head_flops(model)
    for block in model.blocks:
        for place in block.places().values():
            total = total + layer_flops(place.layer, seq_len)
    return total


def head_flops(model: LanguageModel) -> Flops:
    """Of the products with the vocabulary."""
    return Flops(2.0 * model.config.dim * model.vocab_size, 0.0, 0.0)


def layer_flops(layer: nnx.Module, seq_len: int) -> Flops:
    """Of one place of the pattern, all its repeats together."""
    matrices = _matrices(layer)
    matmul = sum(2.0 * leaf.size for leaf in matrices)
    attention = memory = 0.0
    repeats = matrices[0].shape[0] if matrices else 1
    if isinstance(layer, Attention):
        seen = _mean_visible(layer.config.window, layer.config.sink_tokens, seq_len)
        width = layer.num_heads * layer.head_dim * repeats
        attention = 4.0 * seen * width
        if isinstance(layer, BankMemory):
            local = _mean_visible(layer.config.window, 0, seq_len)
            searched = _mean_visible(layer.bank.slots, 0, seq_len) - local
            memory = (2.0 * searched + 2.0 * min(searched, layer.bank.top_k)) * width
    elif isinstance(layer, ProductKeyMemory):
        c = layer.config
        scores = 2.0 * c.num_heads * layer.half_slots * c.key_dim
        values = 2.0 * c.num_heads * c.top_k * c.value_dim
        memory = (scores + values) * repeats
    elif isinstance(layer, NGramMemory):
        # Rows as they are read; one score and one gated value, of the model's width.
        rows = 2.0 * layer.config.hashing.num_parts * layer.config.head_dim
        memory = (rows + 4.0 * layer.key.weight.shape[-1]) * repeats
    elif isinstance(layer, MatrixMemory):
        # Token by token: what is read and written, and what is erased first.
        shape = layer.shape
        passes = 2 + (isinstance(layer, GatedDelta) and layer.config.erase is not None)
        memory = 2.0 * passes * shape.num_heads * shape.key_dim * shape.value_dim * repeats
    elif isinstance(layer, Mamba1):
        memory = 4.0 * layer.inner * layer.config.state_dim * repeats
        # The rates are a matrix by their shape alone.
        matmul -= 2.0 * layer.inner * layer.config.state_dim * repeats
    elif isinstance(layer, MoE):
        # Only what a token is sent to; the router and the shared expert are among the matrices.
        experts = sum(leaf.size for leaf in jax.tree.leaves(layer) if leaf.ndim == 4)
        matmul += 2.0 * experts * layer.config.top_k / layer.config.num_experts
    return Flops(matmul, attention, memory)


def _mean_visible(window: int | None, sinks: int, seq_len: int) -> float:
    """Keys that a query sees, averaged over the positions of a row."""
    window = min(window or seq_len, seq_len)
    near = window * (window + 1) // 2 + (seq_len - window) * window
    # The k-th token after the window has k tokens outside, of which it sees the sinks.
    outside = seq_len - window
    few = min(sinks, outside)
    far = few * (few + 1) // 2 + (outside - few) * sinks
    return (near + far) / seq_len


def _matrices(layer: nnx.Module) -> list[jax.Array]:
    """The stacked weights of matrix products: `layers` and two dimensions."""
    return [leaf for leaf in jax.tree.leaves(layer) if leaf.ndim == 3]
