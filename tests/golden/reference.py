"""The golden model's forward pass in float64 NumPy: dense, whole, slow, and written from equations.

Reads parameters by name from the artifact's safetensors. Knows nothing of memtrain.
"""

import numpy as np


def rms(x, scale=np.ones(())):  # noqa: B008
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def rotate(x, theta=10_000.0):
    """x [T, H, D] at positions 0..T-1."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def convolve(x, taps):
    """y[t] = sum of taps[i] * x[t - i]."""
    padded = np.concatenate([np.zeros((len(taps) - 1, x.shape[1])), x])
    shifted = [padded[len(taps) - 1 - i :][: len(x)] for i in range(len(taps))]
    return np.einsum("id,itd->td", taps, np.stack(shifted))


def attention(x, p, *, heads, kv_heads, window=None, sinks=0):
    T = len(x)
    query, key, value = (x @ p[f"{name}.weight"] for name in ("query", "key", "value"))
    if "key_conv.taps" in p:
        key = convolve(key, p["key_conv.taps"])
    q = rotate(rms(query.reshape(T, heads, -1), p["query_norm.scale"]))
    k = rotate(rms(key.reshape(T, kv_heads, -1), p["key_norm.scale"]))
    v = value.reshape(T, kv_heads, -1)
    t, s = np.arange(T)[:, None], np.arange(T)[None]
    visible = s <= t
    if window is not None:
        visible &= (t - s < window) | (s < sinks)
    out = np.zeros_like(q)
    for h in range(heads):
        g = h // (heads // kv_heads)
        scores = q[:, h] @ k[:, g].T / np.sqrt(q.shape[-1])
        out[:, h] = softmax(np.where(visible, scores, -np.inf)) @ v[:, g]
    return out.reshape(T, -1) @ p["output.weight"]


def bank(x, p, *, heads, kv_heads, window, size, top_k):
    """Attention to a window, and by a gate to the best keys of those before it."""
    T = len(x)
    query, key, value = (x @ p[f"{name}.weight"] for name in ("query", "key", "value"))
    query, key = query.reshape(T, heads, -1), key.reshape(T, kv_heads, -1)
    v = value.reshape(T, kv_heads, -1)
    q, k = rotate(rms(query, p["query_norm.scale"])), rotate(rms(key, p["key_norm.scale"]))
    unit_q, unit_k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (query, key))
    distance = np.arange(T)[:, None] - np.arange(T)[None]
    near = (distance >= 0) & (distance < window)
    far = (distance >= window) & (distance < window + size)
    out = np.zeros_like(q)
    for h in range(heads):
        g = h // (heads // kv_heads)
        local = q[:, h] @ k[:, g].T / np.sqrt(q.shape[-1])
        out[:, h] = softmax(np.where(near, local, -np.inf)) @ v[:, g]
        scores = unit_q[:, h] @ unit_k[:, g].T * np.exp(p["log_scale"][h])
        share = 1 / (1 + np.exp(-p["gate"][h]))
        for t in range(window, T):
            seen = np.flatnonzero(far[t])
            best = seen[np.argsort(-scores[t, seen], kind="stable")[:top_k]]
            out[t, h] = share * (softmax(scores[t, best]) @ v[best, g]) + (1 - share) * out[t, h]
    return out.reshape(T, -1) @ p["output.weight"]


def delta(x, p, *, heads):
    """Gated DeltaNet, token by token."""
    T = len(x)
    parts = (
        silu(convolve(x @ p[f"{name}.weight"], p[f"{name}_conv.taps"])).reshape(T, heads, -1)
        for name in ("query", "key", "value")
    )
    query, key, value = parts
    query, key = (a / np.sqrt(np.sum(a * a, axis=-1, keepdims=True) + 1e-6) for a in (query, key))
    step = np.logaddexp(0, x @ p["decay.weight"] + p["step_bias"])
    decay = np.exp(-np.exp(p["log_rate"]) * step)
    share = 1 / (1 + np.exp(-(x @ p["erase_gate.weight"])))
    out = np.zeros_like(value)
    for h in range(heads):
        S = np.zeros((key.shape[-1], value.shape[-1]))
        for t in range(T):
            S *= decay[t, h]
            S += np.outer(key[t, h], share[t, h] * (value[t, h] - key[t, h] @ S))
            out[t, h] = query[t, h] @ S / np.sqrt(key.shape[-1])
    y = rms(out, p["norm.scale"]).reshape(T, -1) * silu(x @ p["gate.weight"])
    return y @ p["output.weight"]


def swiglu(x, p):
    return (silu(x @ p["gate.weight"]) * (x @ p["input.weight"])) @ p["output.weight"]


def product_key(x, p, table, *, top_k):
    """Scores every slot of the table and takes the best: no product-key trick."""
    T = len(x)
    _, heads, n, half = p["keys"].shape
    q = rms((x @ p["query.weight"]).reshape(T, heads, 2, half)) / np.sqrt(half)
    keys = rms(p["keys"])
    y = np.zeros((T, table.shape[1]))
    for h in range(heads):
        first, second = q[:, h, 0] @ keys[0, h].T, q[:, h, 1] @ keys[1, h].T
        scores = (first[:, :, None] + second[:, None, :]).reshape(T, n * n)
        scores = scores * np.exp(p["log_temperature"][h])
        best = np.argsort(-scores, axis=-1, kind="stable")[:, :top_k]
        weights = softmax(np.take_along_axis(scores, best, axis=-1))
        y += np.einsum("tk,tkd->td", weights, table[best])
    return (y * silu(x @ p["gate.weight"])) @ p["output.weight"]


def logits(weights, tokens, *, depth, heads, kv_heads, window, sinks, top_k, banked, delta_heads):
    """[T, V]. In turn: windowed attention and SwiGLU; the gated delta rule; a bank and SwiGLU; full
    attention and the table."""
    w = {name: np.asarray(a, np.float64) for name, a in weights.items()}
    under = lambda prefix: {  # noqa: E731
        n.removeprefix(prefix): a for n, a in w.items() if n.startswith(prefix)
    }
    x = w["embedding"][tokens] * np.sqrt(w["embedding"].shape[1])
    for i in range(depth):
        kind = ("window", "delta", "bank", "table")[i % 4]
        mixer, ffn = under(f"layers.{i}.mixer."), under(f"layers.{i}.ffn.")
        h = rms(x, w[f"layers.{i}.mixer_norm.scale"])
        if kind == "delta":
            x = x + delta(h, mixer, heads=delta_heads)
            continue
        more = {"window": window, "sinks": sinks} if kind == "window" else {}
        if kind == "bank":
            x = x + bank(h, mixer, heads=heads, kv_heads=kv_heads, **banked)
        else:
            x = x + attention(h, mixer, heads=heads, kv_heads=kv_heads, **more)
        h = rms(x, w[f"layers.{i}.ffn_norm.scale"])
        if kind in ("window", "bank"):
            x = x + swiglu(h, ffn)
        else:
            x = x + product_key(h, ffn, w["tables.memory"], top_k=top_k)
    return rms(x, w["final_norm.scale"]) @ w["embedding"].T
