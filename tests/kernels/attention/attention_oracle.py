"""Attention and its gradient written down in NumPy float64, one pair and one head at a time.

Independent of the code under test: no blocks, no running maximum, no automatic differentiation. The
mask is a scalar function of two tokens, as DESIGN section 5 words it.
"""

from __future__ import annotations

import numpy as np


def sees(spec, q_pos: int, kv_pos: int, q_seg: int, kv_seg: int) -> bool:
    q_pos, kv_pos = int(q_pos), int(kv_pos)
    if q_seg < 0 or kv_seg < 0 or q_seg != kv_seg:
        return False
    if not (spec.prefix and kv_pos < spec.prefix):
        if spec.causal and kv_pos > q_pos:
            return False
        left, right = spec.window if isinstance(spec.window, tuple) else (spec.window, None)
        outside = left is not None and q_pos - kv_pos >= left
        if outside and not (spec.sink_tokens and kv_pos < spec.sink_tokens):
            return False
        if right is not None and kv_pos - q_pos >= right:
            return False
    return spec.mask_fn is None or bool(spec.mask_fn(q_pos, kv_pos, q_seg, kv_seg))


def dense(q, k, v, spec, positions, segments, sink_logits=None, prior=None, cotangents=None):
    """(out, lse), or with cotangents (d_out, d_lse): (out, lse), dict of gradients."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, H, D = q.shape
    S, K, E = v.shape[1:]
    (q_pos, kv_pos), (q_seg, kv_seg) = positions, segments
    scale = D**-0.5 if spec.scale is None else spec.scale
    out, lse = np.zeros((B, T, H, E)), np.full((B, T, H), -np.inf)
    grads = {"q": np.zeros_like(q), "k": np.zeros_like(k), "v": np.zeros_like(v)}
    grads["sink_logits"] = np.zeros(H)
    grads["prior_o"], grads["prior_lse"] = np.zeros((B, T, H, E)), np.zeros((B, T, H))
    for b, t in np.ndindex(B, T):
        seen = [
            s for s in range(S) if sees(spec, q_pos[b, t], kv_pos[b, s], q_seg[b, t], kv_seg[b, s])
        ]
        for h in range(H):
            kv_head = h // (H // K)
            raw = k[b, seen, kv_head] @ q[b, t, h] * scale
            capped = raw if spec.soft_cap is None else spec.soft_cap * np.tanh(raw / spec.soft_cap)
            # Every contribution to the denominator is one (logit, value) pair.
            logits, values = list(capped), [v[b, s, kv_head] for s in seen]
            if prior is not None:
                logits.append(float(prior[1][b, t, h]))
                values.append(np.asarray(prior[0][b, t, h], np.float64))
            if sink_logits is not None:
                logits.append(float(sink_logits[h]))
                values.append(np.zeros(E))
            logits = np.array(logits, np.float64)
            if not len(logits) or logits.max() == -np.inf:
                continue
            top = logits.max()
            total = np.exp(logits - top).sum()
            weights = np.exp(logits - top) / total
            out[b, t, h] = sum(w * x for w, x in zip(weights, values, strict=True))
            lse[b, t, h] = top + np.log(total)
            if cotangents is None:
                continue
            d_out, d_lse = cotangents[0][b, t, h], cotangents[1][b, t, h]
            d_logits = weights * (np.array(values) @ d_out - out[b, t, h] @ d_out + d_lse)
            if sink_logits is not None:
                grads["sink_logits"][h] += d_logits[-1]
            if prior is not None:
                grads["prior_lse"][b, t, h] = d_logits[len(seen)]
                grads["prior_o"][b, t, h] = weights[len(seen)] * d_out
            for n, s in enumerate(seen):
                d_raw = d_logits[n]
                if spec.soft_cap is not None:
                    d_raw *= 1 - np.tanh(raw[n] / spec.soft_cap) ** 2
                grads["v"][b, s, kv_head] += weights[n] * d_out
                grads["q"][b, t, h] += d_raw * scale * k[b, s, kv_head]
                grads["k"][b, s, kv_head] += d_raw * scale * q[b, t, h]
    return (out, lse) if cotangents is None else ((out, lse), grads)


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


def packed(rng, batch: int, length: int, documents: int, padding: int = 0):
    """Segments [B, T] of packed documents and positions inside them; padding (-1) at the end."""
    shown = length - padding
    cuts = np.sort(rng.integers(0, shown + 1, (batch, documents - 1)), axis=1)
    segments = (np.arange(length)[None, :, None] >= cuts[:, None, :]).sum(-1)
    positions = np.zeros((batch, length), np.int64)
    for b, t in np.ndindex(batch, length):
        if t and segments[b, t] == segments[b, t - 1]:
            positions[b, t] = positions[b, t - 1] + 1
    segments[:, shown:] = -1
    return segments.astype(np.int32), positions.astype(np.int32)
