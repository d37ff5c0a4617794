"""Attention and its gradient in NumPy float64, whole matrices: the mask is attention_oracle's.

As independent of the code under test as attention_oracle.dense, and fast at the few hundred tokens
that several tiles of 128 take; test_against_oracle holds the two to each other.
"""

from __future__ import annotations

import numpy as np
from attention_oracle import close, packed, sees  # pyright: ignore[reportMissingImports]
from attention_oracle import dense as dense_by_pairs  # pyright: ignore[reportMissingImports]


__all__ = ["close", "dense", "dense_by_pairs", "mask", "packed"]


def dense(q, k, v, spec, positions, segments, cotangents):
    """(out [B, T, H, E], lse [B, T, H]), (dq, dk, dv), of arrays as attention_oracle.dense's."""
    q, k, v, d_out, d_lse = (np.asarray(x, np.float64) for x in (q, k, v, *cotangents))
    B, T, H, D = q.shape
    K, E = v.shape[2:]
    scale = D**-0.5 if spec.scale is None else spec.scale
    out, lse = np.zeros((B, T, H, E)), np.full((B, T, H), -np.inf)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b in range(B):
        seen = mask(spec, *(x[b] for x in (*positions, *segments)))
        some = seen.any(1)
        for h in range(H):
            g = h // (H // K)
            raw = scale * q[b, :, h] @ k[b, :, g].T
            bent = raw if spec.soft_cap is None else spec.soft_cap * np.tanh(raw / spec.soft_cap)
            logits = np.where(seen, bent, -np.inf)
            top = np.where(some, logits.max(1, initial=-1e300), 0)
            total = np.exp(logits - top[:, None]).sum(1)
            with np.errstate(divide="ignore"):
                lse[b, :, h] = top + np.log(total)
            weights = np.exp(logits - np.where(some, lse[b, :, h], 0)[:, None])
            out[b, :, h] = weights @ v[b, :, g]
            dv[b, :, g] += weights.T @ d_out[b, :, h]
            inner = (d_out[b, :, h] * out[b, :, h]).sum(1) - d_lse[b, :, h]
            d_raw = weights * (d_out[b, :, h] @ v[b, :, g].T - inner[:, None])
            if spec.soft_cap is not None:
                d_raw *= 1 - np.tanh(raw / spec.soft_cap) ** 2
            dq[b, :, h] = scale * d_raw @ k[b, :, g]
            dk[b, :, g] += scale * d_raw.T @ q[b, :, h]
    return (out, lse), (dq, dk, dv)


def mask(spec, q_pos, kv_pos, q_seg, kv_seg) -> np.ndarray:
    """bool [T, S] by attention_oracle.sees, from int arrays [T] and [S]."""
    q, kv = list(zip(q_pos, q_seg, strict=True)), list(zip(kv_pos, kv_seg, strict=True))
    # As Python ints: a scalar of NumPy's is slow to compare.
    q, kv = ([(int(p), int(s)) for p, s in side] for side in (q, kv))
    return np.array([[sees(spec, qp, kp, qs, ks) for kp, ks in kv] for qp, qs in q])
