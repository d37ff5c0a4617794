"""Bytes of the memories' state at decode: the KV cache and its kin."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from memtrain.decode.cache_spec import cache_spec
from memtrain.model.config import ModelConfig
from memtrain.model.unstacked import abstract_model


@dataclasses.dataclass(frozen=True)
class CacheBytes:
    """content: keys and values. scales: float32, where the content is quantized."""

    content: int
    scales: int

    @property
    def total(self) -> int:
        return self.content + self.scales


def kv_cache_bytes(
    *,
    layers: int,
    kv_heads: int,
    head_dim: int,
    tokens: int,
    dtype: str = "bfloat16",
    tokens_per_scale: int | None = 1,
) -> CacheBytes:
    """Of full attention: a key and a value for each layer, head and token.

    8-bit content has float32 scales: one for every `tokens_per_scale` tokens of each head's keys,
    and one of its values (a page of `memtrain_kernels.quantize_pages`; None: one for all tokens).
    """
    heads = 2 * layers * kv_heads
    itemsize = jnp.dtype(dtype).itemsize
    scales = 0
    if itemsize == 1:
        scales = heads * (1 if tokens_per_scale is None else -(-tokens // tokens_per_scale)) * 4
    return CacheBytes(heads * tokens * head_dim * itemsize, scales)


def decode_state(config: ModelConfig, vocab_size: int) -> list[dict[str, Any]]:
    """For each kind of memory: how many there are, and bytes per token and per sequence.

    bytes_per_token: what one more token of one sequence adds, in all layers of the kind.
    bytes_per_sequence: what a sequence takes however long it is (rings full).
    """
    kinds: dict[str, dict[str, Any]] = {}
    for place in cache_spec(abstract_model(config, vocab_size))["places"]:
        row = kinds.setdefault(
            place["memory"],
            {"kind": place["memory"], "layers": 0, "bytes_per_token": 0, "bytes_per_sequence": 0},
        )
        row["layers"] += 1
        row["bytes_per_token"] += place["bytes_per_token"]
        row["bytes_per_sequence"] += place["bytes_per_sequence"]
    return list(kinds.values())
