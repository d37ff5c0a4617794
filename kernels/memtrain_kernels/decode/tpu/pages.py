"""Pages in on-chip memory: how a block of them lies there, taking it apart, clearing its end.

A block of C pages is kept as it is in the pool: [C, K, S, D] where heads come first, else token by
token, [W, X, K, D / W], in W pieces of 128 lanes at most: the strided loads that take heads apart
take no more. Numbers narrower than 32 bits are packed into words along the second dim from
the end: `packed` tokens of one head where heads come first, else `packed` heads of one token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memtrain_kernels.decode.tpu.call import Call


_LANES = 128


def block_shape(call: Call, K: int, D: int) -> tuple[int, int, int, int]:
    """The shape in which a block is kept."""
    if call.heads_first:
        return call.C, K, call.S, D
    lanes = min(D, _LANES)
    return D // lanes, call.tokens, K, lanes


def page_pieces(
    call: Call, page_ref: Any, block_ref: Any, i: jax.Array
) -> Iterator[tuple[Any, Any]]:
    """From where to where the i-th page of a block is copied."""
    if call.heads_first:
        yield page_ref, block_ref.at[i]
        return
    W, _, _, lanes = block_ref.shape
    for w in range(W):
        piece = page_ref if W == 1 else page_ref.at[:, :, pl.ds(w * lanes, lanes)]
        yield piece, block_ref.at[w, pl.ds(i * call.S, call.S)]


def heads(call: Call, block_ref: Any, dtype: jnp.dtype) -> list[jax.Array]:
    """The numbers of each key head of a block: [X, D] in `dtype`.

    Strided loads of words are several times cheaper than moving heads about in registers (bundles
    that the compiler schedules for 512 tokens of 8 heads on v5e: bfloat16 481 for 1091, int8 583
    for 1742).
    """
    if call.heads_first:
        C, K, S, D = block_ref.shape
        return [block_ref[:, h].astype(dtype).reshape(C * S, D) for h in range(K)]
    pieces = [_heads_of_tokens(call, block_ref.at[w], dtype) for w in range(block_ref.shape[0])]
    return [x[0] if len(x) == 1 else jnp.concatenate(x, axis=1) for x in zip(*pieces, strict=True)]


def _heads_of_tokens(call: Call, ref: Any, dtype: jnp.dtype) -> list[jax.Array]:
    K = ref.shape[1]
    packed = 4 // ref.dtype.itemsize
    if packed == 1:
        return [_words(call, ref, h).astype(dtype) for h in range(K)]
    stored = jnp.dtype(f"int{32 // packed}")
    found = []
    for w in range(K // packed):
        words_XD = _words(call, ref, w)
        for i in range(packed):
            x = (words_XD >> (i * 32 // packed)).astype(stored)
            found.append((x if ref.dtype == stored else pltpu.bitcast(x, ref.dtype)).astype(dtype))
    return found


def _words(call: Call, ref: Any, w: int) -> jax.Array:
    """The w-th row of words of each token: [X, D], of [X, K, D]."""
    X, K, D = ref.shape
    packed = 4 // ref.dtype.itemsize
    if isinstance(call.interpret, pltpu.InterpretParams):
        # That interpreter can do nothing with references but cut them.
        words = ref[...] if packed == 1 else pltpu.bitcast(ref[...], jnp.int32)
        return words[:, w]
    words_ref = ref if packed == 1 else ref.bitcast(jnp.int32)
    return words_ref.reshape(X * K // packed, D)[w :: K // packed]


def clear(call: Call, block_ref: Any, held: jax.Array) -> None:
    """Zeros over a block's tokens from `held` on. By words: chips select nothing narrower."""
    block = block_ref[...]
    packed = 4 // block.dtype.itemsize
    words = block if packed == 1 else pltpu.bitcast(block, jnp.int32)
    if not call.heads_first:
        token = lax.broadcasted_iota(jnp.int32, words.shape, 1)
    else:
        token = lax.broadcasted_iota(jnp.int32, words.shape, 0) * call.S
        token += lax.broadcasted_iota(jnp.int32, words.shape, 2) * packed
        if packed > 1:  # of a word the first tokens stay, which are its lowest bits
            bits = (held - token) * (32 // packed)
            words = jnp.where(bits < 32, words & ((1 << jnp.clip(bits, 0, 31)) - 1), words)
    kept = jnp.where(token < held, words, jnp.zeros_like(words))
    block_ref[...] = kept if packed == 1 else pltpu.bitcast(kept, block.dtype)
