"""Attention in NumPy float64 for a few rows of a long sequence: what the benchmark checks against.

Independent of the code under test. Rows of queries are computed whole; gradients of sampled keys
and values need every query's log-sum-exp, which is computed here too, in blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Mask:
    """Causal if asked, a window, and segments [T] where documents are packed."""

    causal: bool = True
    window: int | None = None
    segments: np.ndarray | None = None

    def seen(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        q, k = rows[:, None], columns[None]
        seen = np.ones((len(rows), len(columns)), bool)
        if self.causal:
            seen &= k <= q
        if self.window is not None:
            seen &= q - k < self.window
        if self.segments is not None:
            seen &= self.segments[rows][:, None] == self.segments[columns][None]
        return seen


def attention_rows(q, k, v, mask: Mask, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One head: q [T, D], k [S, D], v [S, E]. Output [R, E] and log-sum-exp [R] of the rows."""
    scores = q[rows].astype(np.float64) @ k.astype(np.float64).T * q.shape[-1] ** -0.5
    scores[~mask.seen(rows, np.arange(len(k)))] = -np.inf
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    return weights / total @ v.astype(np.float64), (top + np.log(total))[:, 0]


def attention_gradients(
    q, k, v, d_out, mask: Mask, rows: np.ndarray, block: int = 1024
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One head: gradients of sum(out * d_out) for query rows, and for key and value rows, [R, .]
    each."""
    q, k, v, d_out = (x.astype(np.float64) for x in (q, k, v, d_out))
    scale = q.shape[-1] ** -0.5
    T = len(q)
    lse, delta = np.empty(T), np.empty(T)
    for a in range(0, T, block):
        some = np.arange(a, min(a + block, T))
        out, lse[some] = attention_rows(q, k, v, mask, some)
        delta[some] = np.sum(out * d_out[some], axis=-1)

    def scores_gradient(r: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = np.exp(q[r] @ k[c].T * scale - lse[r][:, None]) * mask.seen(r, c)
        return p, p * (d_out[r] @ v[c].T - delta[r][:, None])

    everything = np.arange(T)
    _, ds = scores_gradient(rows, np.arange(len(k)))
    p_columns, ds_columns = scores_gradient(everything, rows)
    return ds @ k * scale, ds_columns.T @ q * scale, p_columns.T @ d_out


def relative(ours, theirs) -> float:
    """The greatest difference as a share of the greatest magnitude."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    difference = np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-9)
    return float(difference) if np.isfinite(difference) else float("inf")
