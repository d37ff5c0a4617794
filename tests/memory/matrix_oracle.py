"""GatedDelta, Mamba2 and Mamba1 in float64 NumPy, from their papers' equations: one document of one
row, token by token. Parameters come by name; nothing of memtrain is used."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


Weights = Mapping[str, np.ndarray]


def silu(x):
    return x / (1 + np.exp(-x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.logaddexp(0, x)


def rms(x, scale):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def convolve(x, taps, bias=0.0):
    """y[t] = sum of taps[i] * x[t - i], and the bias."""
    y = np.zeros_like(x)
    for i, tap in enumerate(taps):
        y[i:] += tap * x[: len(x) - i]
    return y + bias


def gated_delta(x, w: Weights, *, heads, key_heads, decay, erase, write, negative, conv, gate):
    """[T, D]. S = diag(e^g) S; S = S + k (w * v - (b * k)^T S); y = S^T q."""
    T = len(x)
    made = {}
    for part in ("query", "key", "value"):
        a = x @ w[f"{part}.weight"]
        a = silu(convolve(a, w[f"{part}_conv.taps"]) if conv else a)
        n = heads if part == "value" else key_heads
        made[part] = a.reshape(T, n, -1).repeat(heads // n, axis=1)
    unit = lambda a: a / np.sqrt(np.sum(a * a, axis=-1, keepdims=True) + 1e-6)  # noqa: E731
    q, k, v = unit(made["query"]), unit(made["key"]), made["value"]
    K, V = k.shape[-1], v.shape[-1]
    g = np.zeros((T, heads, K))
    if decay is not None:
        a = (
            x @ w["decay.weight"]
            if decay == "head"
            else x @ w["decay_in.weight"] @ w["decay.weight"]
        )
        step = softplus(a + w["step_bias"]).reshape(T, heads, -1)
        g = g - np.exp(w["log_rate"])[:, None] * step
    b = np.zeros((T, heads, K))
    if erase is not None:
        b = b + sigmoid(x @ w["erase_gate.weight"]).reshape(T, heads, -1) * (2 if negative else 1)
    if write == "tied":
        strength = b[..., :1]
    elif write is None:
        strength = np.ones((T, heads, V))
    else:
        strength = sigmoid(x @ w["write_gate.weight"]).reshape(T, heads, -1)
    out = np.zeros((T, heads, V))
    for h in range(heads):
        S = np.zeros((K, V))
        for t in range(T):
            S = np.exp(g[t, h])[:, None] * S
            S = S + np.outer(k[t, h], strength[t, h] * v[t, h] - (b[t, h] * k[t, h]) @ S)
            out[t, h] = S.T @ q[t, h] / np.sqrt(K)
    y = rms(out, w["norm.scale"]).reshape(T, -1)
    if gate is not None:
        y = y * (silu if gate == "silu" else sigmoid)(x @ w["gate.weight"])
    return y @ w["output.weight"]


def mamba2(x, w: Weights, *, heads, groups, norm_groups=1):
    """[T, D]. h = exp(-d A) h + d B x^T; y = h^T C + D x."""
    T = len(x)
    made = {}
    for part, n in (("query", groups), ("key", groups), ("value", heads)):
        a = convolve(x @ w[f"{part}.weight"], w[f"{part}_conv.taps"], w[f"{part}_conv.bias"])
        made[part] = silu(a).reshape(T, n, -1).repeat(heads // n, axis=1)
    C, B, u = made["query"], made["key"], made["value"]
    d = softplus(x @ w["step.weight"] + w["step_bias"])
    out = np.zeros_like(u)
    for n in range(heads):
        h = np.zeros((B.shape[-1], u.shape[-1]))
        for t in range(T):
            h = np.exp(-d[t, n] * np.exp(w["log_rate"][n])) * h + d[t, n] * np.outer(
                B[t, n], u[t, n]
            )
            out[t, n] = h.T @ C[t, n] + w["skip"][n] * u[t, n]
    gated = out.reshape(T, -1) * silu(x @ w["gate.weight"])
    scale = w["norm.scale"].reshape(norm_groups, -1)
    return rms(gated.reshape(T, norm_groups, -1), scale).reshape(T, -1) @ w["output.weight"]


def mamba1(x, w: Weights, *, inner_norm):
    """[T, D]. h = exp(-d A) h + d u B; y = h . C + D u, for every channel."""
    u = silu(convolve(x @ w["value.weight"], w["conv.taps"], w["conv.bias"]))
    r, B, C = (u @ w[f"{name}.weight"] for name in ("step_in", "key", "query"))
    if inner_norm:
        scales = (w[f"{name}_norm.scale"] for name in ("step", "key", "query"))
        r, B, C = (rms(a, scale) for a, scale in zip((r, B, C), scales, strict=True))
    d = softplus(r @ w["step.weight"] + w["step_bias"])
    h = np.zeros((u.shape[1], B.shape[1]))
    y = np.zeros_like(u)
    for t in range(len(x)):
        h = np.exp(-d[t][:, None] * np.exp(w["log_rate"])) * h + np.outer(d[t] * u[t], B[t])
        y[t] = h @ C[t] + w["skip"] * u[t]
    return (y * silu(x @ w["gate.weight"])) @ w["output.weight"]
