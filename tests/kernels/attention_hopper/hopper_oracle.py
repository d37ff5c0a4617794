"""Dense attention and its gradient in NumPy float64, with a mask of its own."""

from __future__ import annotations

import numpy as np


def mask(spec, q_pos, kv_pos, q_seg, kv_seg):
    """bool [B, T, S] of int [B, T] and [B, S]."""
    q, k = q_pos[:, :, None].astype(np.int64), kv_pos[:, None, :].astype(np.int64)
    allowed = np.ones(np.broadcast_shapes(q.shape, k.shape), bool)
    if spec.causal:
        allowed &= ~(k > q)
    if spec.window_left is not None:
        allowed &= ~((q - k >= spec.window_left) & ~(k < spec.sink_tokens))
    if spec.window_right is not None:
        allowed &= ~(k - q >= spec.window_right)
    allowed |= k < spec.prefix
    same = q_seg[:, :, None] == kv_seg[:, None, :]
    return allowed & same & (q_seg >= 0)[:, :, None] & (kv_seg >= 0)[:, None, :]


def dense(q, k, v, spec, tokens, d_out, d_lse):
    """((out, lse), (dq, dk, dv)); tokens are (q_pos, kv_pos, q_seg, kv_seg) with a batch axis."""
    q, k, v, d_out, d_lse = (np.asarray(x, np.float64) for x in (q, k, v, d_out, d_lse))
    group = q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if spec.scale is None else spec.scale
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    seen = np.broadcast_to(mask(spec, *tokens), (q.shape[0], q.shape[1], k.shape[1]))[:, None]
    scaled = np.einsum("bthd,bshd->bhts", q, k) * scale
    slope = np.ones_like(scaled)
    if spec.soft_cap is not None:
        slope = 1 - np.tanh(scaled / spec.soft_cap) ** 2
        scaled = spec.soft_cap * np.tanh(scaled / spec.soft_cap)
    logits = np.where(seen, scaled, -np.inf)
    some = seen.any(-1, keepdims=True)
    top = np.where(some, logits.max(-1, keepdims=True), 0)
    weights = np.where(seen, np.exp(logits - top), 0)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.where(some, top + np.log(total), -np.inf)[..., 0]
    p = weights / np.where(some, total, 1)
    out = np.einsum("bhts,bshd->bthd", p, v)
    dp = np.einsum("bthd,bshd->bhts", d_out, v)
    spread = dp - (p * dp).sum(-1, keepdims=True) + d_lse.transpose(0, 2, 1)[..., None]
    ds = p * spread * slope * scale
    dq = np.einsum("bhts,bshd->bthd", ds, k)
    dk = np.einsum("bhts,bthd->bshd", ds, q)
    dv = np.einsum("bhts,bthd->bshd", p, d_out)
    B, S, H, D = dk.shape
    dk, dv = (x.reshape(B, S, H // group, group, D).sum(3) for x in (dk, dv))
    return (out, lse.transpose(0, 2, 1)), (dq, dk, dv)


def close(ours, theirs, tolerance: float) -> None:
    """|a - b| <= tolerance * max(1, max|b|), and infinities in the same places."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    finite = np.isfinite(theirs)
    np.testing.assert_array_equal(ours[~finite], theirs[~finite])
    error = np.abs(ours[finite] - theirs[finite]).max(initial=0)
    bound = tolerance * max(1.0, np.abs(theirs[finite]).max(initial=0))
    assert error <= bound, f"{error:.2e} > {bound:.2e}"
