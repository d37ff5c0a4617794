"""The language model's description: a pattern of blocks, repeated. Imports no JAX."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from memtrain.description import Dtypes, LayerDescription, above_zero, at_least


@dataclass(frozen=True, kw_only=True)
class Block:
    """x + mixer(norm(x)), then x + ffn(norm(x)). Either place may hold any memory, or be empty."""

    mixer: LayerDescription | None = None
    ffn: LayerDescription | None = None
    residual_gate: bool = False
    """x + tanh(a) layer(norm(x)) with a learned scalar a of each place that begins as 0, so that a
    block put into a trained model begins without effect (Alayrac et al. 2022, Flamingo)."""


RematPolicy = Literal["none", "full", "dots"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only language model."""

    dim: int = 256
    """Width of the residual stream."""
    pattern: tuple[Block | LayerDescription, ...] = ()
    """The blocks of one repeat. A bare layer stands for a block with it as the mixer and `ffn`."""
    repeats: int = 1
    """How often the pattern is stacked."""
    ffn: LayerDescription | None = None
    """Feed-forward layer of pattern entries that are bare layers; SwiGLU unless given."""
    vocab_size: int | None = None
    """The tokenizer's, unless given (a larger one leaves room)."""
    tied_embeddings: bool = True
    norm_epsilon: float = 1e-6
    """Added to the mean square by every RMS norm."""
    embedding_scale: float | None = None
    """What embeddings are multiplied with as they are read; sqrt(dim) unless given."""
    dtypes: Dtypes = field(default_factory=Dtypes)
    remat: RematPolicy = "none"
    """What the backward recomputes: nothing, whole blocks, or all but matrix products."""
    scan_unroll: int | None = None
    """Repeats unrolled per scan step; all of them on CPU and for single tokens unless given."""
    loss_chunk_tokens: int = 2048
    """Tokens whose logits exist at the same time."""

    def __post_init__(self):
        least = {"dim": 1, "repeats": 1, "vocab_size": 1, "scan_unroll": 1, "loss_chunk_tokens": 1}
        at_least(self, "model", least)
        above_zero(self, "model", "norm_epsilon")
        above_zero(self, "model", "embedding_scale")
