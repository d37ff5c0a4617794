"""Paged decoding written down in NumPy float64, a token, a query and a head at a time; and caches.

Independent of the code under test: tokens are looked up one by one, the mask is a scalar function
of two positions, nothing is blocked, and no masked number is ever multiplied.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np


class Cache(NamedTuple):
    """A pool of pages, and who holds which; scales [K] or [P, K] for 8-bit pages."""

    k_pages: np.ndarray
    v_pages: np.ndarray
    block_tables: np.ndarray
    lengths: np.ndarray
    k_scales: np.ndarray | None
    v_scales: np.ndarray | None


def sees(spec, q_pos: int, kv_pos: int) -> bool:
    if not kv_pos < spec.prefix:
        if spec.causal and kv_pos > q_pos:
            return False
        left, right = spec.window if isinstance(spec.window, tuple) else (spec.window, None)
        outside = left is not None and q_pos - kv_pos >= left
        if outside and not kv_pos < spec.sink_tokens:
            return False
        if right is not None and kv_pos - q_pos >= right:
            return False
    zero = np.zeros((), np.int32)
    return spec.mask_fn is None or bool(spec.mask_fn(zero + q_pos, zero + kv_pos, zero, zero))


def decode(q, cache: Cache, spec, sink_logits=None, prior=None):
    """(out [B, T, H, E], lse [B, T, H])."""
    q = np.asarray(q, np.float64)
    B, T, H, D = q.shape
    S, K, E = cache.v_pages.shape[1:]
    scale = D**-0.5 if spec.scale is None else spec.scale
    out, lse = np.zeros((B, T, H, E)), np.full((B, T, H), -np.inf)
    for b, t, h in np.ndindex(B, T, H):
        length, head = int(cache.lengths[b]), h // (H // K)
        q_pos = length - T + t
        logits, values = [], []
        for pos in range(length):
            if q_pos < 0 or not sees(spec, q_pos, pos):
                continue
            page, slot = int(cache.block_tables[b, pos // S]), pos % S
            key = _number(cache.k_pages[page, slot, head], cache.k_scales, page, head)
            value = _number(cache.v_pages[page, slot, head], cache.v_scales, page, head)
            score = float(key @ q[b, t, h]) * scale
            if spec.soft_cap is not None:
                score = spec.soft_cap * np.tanh(score / spec.soft_cap)
            logits.append(score)
            values.append(value)
        if prior is not None:
            logits.append(float(prior[1][b, t, h]))
            values.append(np.asarray(prior[0][b, t, h], np.float64))
        if sink_logits is not None:
            logits.append(float(sink_logits[h]))
            values.append(np.zeros(E))
        if not logits or max(logits) == -np.inf:
            continue
        top = max(logits)
        weights = np.exp(np.array(logits) - top)
        out[b, t, h] = weights @ np.array(values) / weights.sum()
        lse[b, t, h] = top + np.log(weights.sum())
    return out, lse


def _number(stored: np.ndarray, scales: np.ndarray | None, page: int, head: int) -> np.ndarray:
    x = stored.astype(np.float64)
    if scales is None:
        return x
    return x * np.float64(scales[head] if scales.ndim == 1 else scales[page, head])


def cache(
    rng,
    lengths: list[int],
    *,
    page_size: int,
    max_pages: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    dtype: str = "float32",
    per_page: bool = False,
    shared: int = 0,
) -> Cache:
    """A cache of random numbers in scattered pages, and poison wherever nothing may look.

    Pages that no row holds and slots beyond a length hold NaN (int8: the extremes); table entries
    beyond a length are no page numbers. Rows hold their first `shared` pages in common.
    """
    B, S, M = len(lengths), page_size, max_pages
    held = [-(-length // S) for length in lengths]
    P = sum(held) + 3
    names = iter(rng.permutation(P)[: sum(held)])
    tables = rng.choice([-7, P, 2**30, -(2**31)], (B, M)).astype(np.int32)
    for b in range(B):
        for m in range(held[b]):
            tables[b, m] = tables[0, m] if b and m < min(shared, held[0]) else next(names)
    used = np.zeros((P, S), bool)
    for b, length in enumerate(lengths):
        for pos in range(length):
            used[tables[b, pos // S], pos % S] = True
    pools, all_scales = [], []
    for dim in (head_dim, value_dim or head_dim):
        x = rng.standard_normal((P, S, kv_heads, dim)).astype(np.float32)
        # Heads of different sizes, but none above 4: a logit's rounding error grows with the key's
        # size and moves the output by the value's, so float32 strays with the square of it.
        x *= np.geomspace(0.5, min(2.0 ** (kv_heads - 2), 4), kv_heads)[:, None]
        if dtype in ("int8", "float8_e4m3fn"):
            greatest = np.abs(x).max(axis=(1, 3) if per_page else (0, 1, 3))
            scales = (greatest / (127 if dtype == "int8" else 448)).astype(np.float32)
            x = x / (scales[:, None, :, None] if per_page else scales[:, None])
            all_scales.append(scales)
        else:
            all_scales.append(None)
        if dtype == "int8":
            pool = np.rint(x).astype(np.int8)
            pool[~used] = rng.choice([-128, 127], pool[~used].shape)
        else:
            pool = x.astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
            pool[~used] = np.nan
        pools.append(pool)
    if per_page and all_scales[0] is not None:
        for scales in all_scales:  # of pages that nobody holds
            scales[~used.any(axis=1)] = np.float32(1e30)
    return Cache(
        pools[0], pools[1], tables, np.array(lengths, np.int32), all_scales[0], all_scales[1]
    )


def close(ours, theirs, tolerance: float) -> None:
    """|a - b| <= tolerance * max(1, max|b|), and infinities in the same places."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    finite = np.isfinite(theirs)
    np.testing.assert_array_equal(ours[~finite], theirs[~finite])
    if finite.any():
        error = np.abs(ours[finite] - theirs[finite]).max()
        bound = tolerance * max(1.0, np.abs(theirs[finite]).max())
        assert error <= bound, f"{error:.2e} > {bound:.2e}"
