"""Lookup written down in NumPy float64, one query and one head at a time.

Independent of the code under test: all scores are formed, one sort picks, no automatic
differentiation.
"""

from __future__ import annotations

import numpy as np


def sees(q_pos, kv_pos, q_seg, kv_seg, mask_fn=None) -> bool:
    """Of one query and one key."""
    if q_seg < 0 or kv_seg < 0 or q_seg != kv_seg:
        return False
    return mask_fn is None or bool(mask_fn(q_pos, kv_pos, q_seg, kv_seg))


def topk(
    q, keys, k, *, positions=None, segments=None, mask_fn=None, scales=None
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and indices [B, T, H, k].

    positions, segments: (of queries [B, T], of keys [B, S]). scales: [B or 1, S, Hkv].
    """
    q, keys = np.asarray(q, np.float64), _scaled(keys, scales)
    B, T, H, _ = q.shape
    S, K = keys.shape[1:3]
    q_pos, kv_pos = positions or (np.tile(np.arange(T), (B, 1)), np.tile(np.arange(S), (B, 1)))
    q_seg, kv_seg = segments or (np.zeros((B, T), int), np.zeros((B, S), int))
    scores, indices = np.full((B, T, H, k), -np.inf), np.full((B, T, H, k), -1)
    for b, t in np.ndindex(B, T):
        kb = b if keys.shape[0] > 1 else 0
        pairs = zip(kv_pos[b], kv_seg[b], strict=True)
        seen = np.flatnonzero([sees(q_pos[b, t], p, q_seg[b, t], s, mask_fn) for p, s in pairs])
        for h in range(H):
            products = keys[kb, seen, h // (H // K)] @ q[b, t, h]
            order = np.lexsort((seen, kv_pos[b, seen], -products))[:k]
            indices[b, t, h, : len(order)] = seen[order]
            scores[b, t, h, : len(order)] = products[order]
    return scores, indices


def topk_gradients(q, keys, indices, d_scores, scales=None) -> tuple[np.ndarray, np.ndarray]:
    """Of queries and (scaled) keys, from what was picked."""
    q, keys = np.asarray(q, np.float64), _scaled(keys, scales)
    d_q, d_keys = np.zeros_like(q), np.zeros_like(keys)
    for b, t, h, n in np.ndindex(*indices.shape):
        s, kv_head = indices[b, t, h, n], h // (q.shape[2] // keys.shape[2])
        if s >= 0:
            kb, weight = (b if keys.shape[0] > 1 else 0), float(d_scores[b, t, h, n])
            d_q[b, t, h] += weight * keys[kb, s, kv_head]
            d_keys[kb, s, kv_head] += weight * q[b, t, h]
    return d_q, d_keys


def _scaled(keys, scales) -> np.ndarray:
    keys = np.asarray(keys, np.float64)
    return keys if scales is None else keys * np.asarray(scales, np.float64)[..., None]


def bag(table, slots, weights):
    """y[m] = sum_k weights[m, k] * table[slots[m, k]]; a negative slot is no row."""
    weights = np.where(slots < 0, 0, np.asarray(weights, np.float64))
    return np.einsum("mk,mkd->md", weights, np.asarray(table, np.float64)[np.maximum(slots, 0)])


def table_gradient(slots, weights, dy, num_rows):
    """Row n is the sum of weights[m, k] * dy[m] over the pairs with slots[m, k] = n."""
    total = np.zeros((num_rows, dy.shape[1]))
    for m, k in np.ndindex(*slots.shape):
        if slots[m, k] >= 0:
            total[slots[m, k]] += np.float64(weights[m, k]) * np.asarray(dy[m], np.float64)
    return total


def close(ours, theirs, tolerance: float) -> None:
    """|a - b| <= tolerance * max(1, max|b|), and infinities in the same places."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    finite = np.isfinite(theirs)
    np.testing.assert_array_equal(ours[~finite], theirs[~finite])
    if not finite.any():
        return
    error = np.abs(ours[finite] - theirs[finite]).max()
    bound = tolerance * max(1.0, np.abs(theirs[finite]).max())
    assert error <= bound, f"{error:.2e} > {bound:.2e}"
