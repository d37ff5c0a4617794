"""The arguments of a memory lookup, checked and brought to one form."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from memtrain_kernels.lookup.checks import Arrays, check_count, check_dtype, host_value
from memtrain_kernels.lookup.key_blocks import Keys
from memtrain_kernels.lookup.search import MaskFn, Plan, make_plan


STORED_DTYPES = tuple(jnp.dtype(d) for d in (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2))
"""Dtypes in which keys are stored with scales."""


@dataclass(frozen=True)
class Arguments:
    """A lookup in the one form that is computed: keys of batch N, heads apart.

    queries [N, T, H, D]; keys.keys [N or 1, S, K * D]; tokens int32 [N or 1, T] or None, as
    key_blocks.Keys has them. Queries that share their keys are one long row of N = 1.
    shape: of the result.
    """

    plan: Plan
    queries: jax.Array
    q_positions: jax.Array | None
    q_segments: jax.Array | None
    keys: Keys
    shape: tuple[int, ...]


def prepare(
    queries: Arrays,
    keys: Arrays,
    top_k: int,
    q_positions: Arrays | None,
    kv_positions: Arrays | None,
    q_segments: Arrays | None,
    kv_segments: Arrays | None,
    mask_fn: MaskFn | None,
    key_scales: Arrays | None,
    block_queries: int | None,
    block_keys: int | None,
    sorts: bool | None = None,
) -> Arguments:
    """Checks as `memory_topk` says. sorts=False: kv_positions are known to ascend."""
    check_arrays(queries, keys, key_scales)
    check_count("top_k", top_k, 1, keys.shape[0] if keys.ndim == 2 else keys.shape[1])
    for name, value in (("block_queries", block_queries), ("block_keys", block_keys)):
        if value is not None:
            check_count(name, value, 1, None)
    if mask_fn is not None and not callable(mask_fn):
        raise ValueError(f"mask_fn is {mask_fn!r}: give a module-level function, or None")
    queries, keys = jnp.asarray(queries), jnp.asarray(keys)
    if key_scales is not None:
        key_scales = jnp.asarray(key_scales)
    shape = (*queries.shape[:-1], top_k)
    if queries.ndim == 2:
        queries, keys = queries[None, :, None], keys[None, :, None]
        if key_scales is not None:
            key_scales = key_scales[None, :, None] if key_scales.ndim else key_scales[None]

    B, T, H, D = queries.shape
    S, K = keys.shape[1:3]
    q_pos = as_tokens("q_positions", q_positions, B, T)
    kv_pos = as_tokens("kv_positions", kv_positions, B, S)
    q_seg = as_tokens("q_segments", q_segments, B, T)
    kv_seg = as_tokens("kv_segments", kv_segments, B, S)
    sorts = kv_pos is not None if sorts is None else sorts
    if mask_fn is not None or q_seg is not None or kv_seg is not None:
        q_seg = jnp.zeros((1, T), jnp.int32) if q_seg is None else q_seg
        kv_seg = jnp.zeros((1, S), jnp.int32) if kv_seg is None else kv_seg
    if mask_fn is None:
        q_pos = None
    else:
        q_pos = jnp.arange(T, dtype=jnp.int32)[None] if q_pos is None else q_pos
        kv_pos = jnp.arange(S, dtype=jnp.int32)[None] if kv_pos is None else kv_pos

    if all(x is None or x.shape[0] == 1 for x in (keys, kv_pos, kv_seg)):
        queries = queries.reshape(1, B * T, H, D)
        q_pos, q_seg = (
            x if x is None else jnp.broadcast_to(x, (B, T)).reshape(1, B * T)
            for x in (q_pos, q_seg)
        )
    N, T = queries.shape[:2]
    plan = make_plan(int(top_k), T, S, N * K, H // K, sorts, mask_fn, block_queries, block_keys)
    keys = keys.reshape(*keys.shape[:2], K * D)
    return Arguments(plan, queries, q_pos, q_seg, Keys(keys, key_scales, kv_pos, kv_seg), shape)


def check_arrays(queries: Arrays, keys: Arrays, scales: Arrays | None) -> None:
    """Shapes and dtypes of queries, keys and scales, and the scales' values where they are seen."""
    check_dtype("queries", queries, jnp.floating, "a floating dtype of at least 16 bits")
    if queries.dtype.itemsize < 2:
        raise ValueError(f"queries has dtype {queries.dtype}: give one of at least 16 bits")
    if (queries.ndim, keys.ndim) not in ((4, 4), (2, 2)):
        raise ValueError(
            f"queries has shape {queries.shape} and keys {keys.shape}: "
            f"give [B, T, H, D] and [B or 1, S, Hkv, D], or [M, D] and [S, D]"
        )
    if 0 in queries.shape or 0 in keys.shape:
        raise ValueError(f"empty lookup: queries {queries.shape}, keys {keys.shape}")
    if keys.shape[-1] != queries.shape[-1]:
        raise ValueError(f"keys has shape {keys.shape}: give keys of width {queries.shape[-1]}")
    if queries.ndim == 4:
        if keys.shape[0] not in (1, queries.shape[0]):
            raise ValueError(f"keys has batch {keys.shape[0]}: give 1 or {queries.shape[0]}")
        if queries.shape[2] % keys.shape[2]:
            raise ValueError(
                f"queries has {queries.shape[2]} heads and keys {keys.shape[2]}: "
                f"query heads must be a multiple of key heads"
            )
    rows = keys.size // keys.shape[-1]
    if rows >= 2**31 - 1:
        raise ValueError(f"keys has {rows} rows: give less than 2**31 - 1, over batch and heads")
    stored = keys.dtype in STORED_DTYPES
    if not stored and (not jnp.issubdtype(keys.dtype, jnp.floating) or keys.dtype.itemsize < 2):
        right = ", ".join(d.name for d in STORED_DTYPES)
        raise ValueError(
            f"keys has dtype {keys.dtype}: give {right}, or a floating dtype of at least 16 bits"
        )
    if stored and scales is None:
        raise ValueError(f"keys of dtype {keys.dtype} need key_scales: give a key's or a head's")
    if scales is None:
        return
    if not stored:
        raise ValueError(f"key_scales are for int8 and float8 keys, not {keys.dtype}: leave out")
    _check_scales(scales, keys)


def as_tokens(name: str, array: Arrays | None, batch: int, length: int) -> jax.Array | None:
    """[length] or [batch, length] integers as [1 or batch, length]; None stays None."""
    if array is None:
        return None
    check_dtype(name, array, jnp.integer, "int32")
    if array.shape == (length,):
        array = array[None]
    elif array.shape not in ((batch, length), (1, length)):
        raise ValueError(f"{name} has shape {array.shape}: give [{batch}, {length}] or [{length}]")
    return jnp.asarray(array, jnp.int32)


def _check_scales(scales: Arrays, keys: Arrays) -> None:
    check_dtype("key_scales", scales, jnp.floating, "float32")
    a_key, a_head = (keys.shape[:-1], keys.shape[2:-1])
    if scales.shape not in (a_key, a_head):
        raise ValueError(
            f"key_scales has shape {scales.shape}: give {list(a_key)}, one a key, "
            f"or {list(a_head)}, one a head"
        )
    values = host_value(scales)
    if values is not None and not (np.isfinite(values) & (values > 0)).all():
        bad = values[~(np.isfinite(values) & (values > 0))].flat[0]
        raise ValueError(f"key_scales has {bad}: give finite numbers greater than 0")
