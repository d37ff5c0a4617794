"""The memories in float64 NumPy, dense and token by token, written from their equations.

Parameters are dicts of float64 arrays. Nothing here knows of memtrain or JAX.
"""

from __future__ import annotations

import numpy as np


def rms_normalize(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def rotate(x: np.ndarray, position: int, theta: float) -> np.ndarray:
    """x [H, D], one token. Complex numbers x[i] + 1j x[i + D/2], turned."""
    half = x.shape[-1] // 2
    angle = position * float(theta) ** (-np.arange(half) / half)
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attention(
    x: np.ndarray,
    parameters: dict[str, np.ndarray],
    positions: np.ndarray,
    documents: np.ndarray,
    *,
    heads: int,
    kv_heads: int,
    window: int | None = None,
    sinks: int = 0,
    theta: float | None = 10_000.0,
    rotary_dim: int | None = None,
    soft_cap: float | None = None,
) -> np.ndarray:
    """One row, x [T, D]; documents [T], negative where invalid (output 0). A loop over queries."""
    T = len(x)
    q = (x @ parameters["query"]).reshape(T, heads, -1)
    k = x @ parameters["key"]
    if "key_conv" in parameters:
        k = short_conv(k, parameters["key_conv"], documents)
    k = k.reshape(T, kv_heads, -1)
    v = (x @ parameters["value"]).reshape(T, kv_heads, -1)
    if "query_norm" in parameters:
        q = rms_normalize(q) * parameters["query_norm"]
        k = rms_normalize(k) * parameters["key_norm"]
    if theta is not None:
        r = rotary_dim or q.shape[-1]
        for a in (q, k):
            a[..., :r] = [rotate(a[t, :, :r], int(positions[t]), theta) for t in range(T)]
    out = np.zeros((T, x.shape[1]))
    for t in range(T):
        seen = [
            s
            for s in range(T)
            if documents[s] == documents[t] >= 0
            and positions[s] <= positions[t]
            and (window is None or positions[t] - positions[s] < window or positions[s] < sinks)
        ]
        if not seen:
            continue
        heads_out = []
        for h in range(heads):
            group = h // (heads // kv_heads)
            scores = k[seen, group] @ q[t, h] / np.sqrt(q.shape[-1])
            if soft_cap is not None:
                scores = soft_cap * np.tanh(scores / soft_cap)
            heads_out.append(softmax(scores) @ v[seen, group])
        read = np.concatenate(heads_out)
        if "output_gate" in parameters:
            read = read / (1 + np.exp(-x[t] @ parameters["output_gate"]))
        out[t] = read @ parameters["output"]
    return out


def product_key(
    x: np.ndarray,
    parameters: dict[str, np.ndarray],
    table: np.ndarray,
    *,
    heads: int,
    top_k: int,
    qk_norm: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [M, D]. Scores of all slots, one by one. Returns y [M, D], slots and weights [M, H, k]."""
    M = len(x)
    keys = parameters["keys"]  # [2, H, n, d]
    n, d = keys.shape[2:]
    q = (x @ parameters["query"]).reshape(M, heads, 2, d)
    if qk_norm:
        q, keys = rms_normalize(q) / np.sqrt(d), rms_normalize(keys)
    slots = np.zeros((M, heads, top_k), int)
    weights = np.zeros((M, heads, top_k))
    read = np.zeros((M, table.shape[1]))
    for m in range(M):
        for h in range(heads):
            scores = np.array(
                [
                    q[m, h, 0] @ keys[0, h, slot // n] + q[m, h, 1] @ keys[1, h, slot % n]
                    for slot in range(n * n)
                ]
            )
            if qk_norm:
                scores = scores * np.exp(parameters["log_temperature"][h])
            best = np.argsort(-scores, kind="stable")[:top_k]
            slots[m, h], weights[m, h] = best, softmax(scores[best])
            read[m] += weights[m, h] @ table[best]
    y = (read * silu(x @ parameters["gate"])) @ parameters["output"]
    return y, slots, weights


def short_conv(x: np.ndarray, taps: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """One row, x [T, D], taps [W, D]. A loop over tokens and taps."""
    y = np.zeros_like(x)
    for t in range(len(x)):
        for i in range(min(len(taps), t + 1)):
            if documents[t - i] == documents[t]:
                y[t] += taps[i] * x[t - i]
    return y


def linear_recurrence(
    x: np.ndarray, parameters: dict[str, np.ndarray], documents: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One row, x [T, D]; documents [T], negative where invalid. Outputs, and h after the last."""
    u = short_conv(x, parameters["taps"], documents) if "taps" in parameters else x
    rate = np.log1p(np.exp(parameters["rate"]))
    h, document, y = np.zeros(len(rate)), -1, np.zeros_like(x)
    for t in range(len(x)):
        if documents[t] < 0:
            continue
        if documents[t] != document:
            h, document = np.zeros(len(rate)), documents[t]
        a = np.exp(-8 * rate / (1 + np.exp(-(u[t] @ parameters["decay"]))))
        h = a * h + np.sqrt(1 - a * a) * (u[t] @ parameters["value"])
        y[t] = (h * silu(x[t] @ parameters["gate"])) @ parameters["output"]
    return y, h


def bank(
    x: np.ndarray,
    parameters: dict[str, np.ndarray],
    positions: np.ndarray,
    documents: np.ndarray,
    *,
    heads: int,
    kv_heads: int,
    window: int,
    bank_size: int,
    top_k: int,
    join: str,
    theta: float = 10_000.0,
    int8: bool = False,
) -> tuple[np.ndarray, list[list[list[int]]]]:
    """One row, x [T, D]: the output, and the positions that each head of each token picked.

    Local keys are normed and rotated, bank keys of unit length as they are projected.
    """
    T = len(x)
    q = (x @ parameters["query"]).reshape(T, heads, -1)
    k = (x @ parameters["key"]).reshape(T, kv_heads, -1)
    v = (x @ parameters["value"]).reshape(T, kv_heads, -1)
    unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)  # noqa: E731
    q_bank, k_bank = unit(q), unit(k)
    if int8:
        step = np.abs(k_bank).max(axis=-1, keepdims=True) / 127
        k_bank = np.round(k_bank / step) * step
    q = rms_normalize(q) * parameters["query_norm"]
    k = rms_normalize(k) * parameters["key_norm"]
    q = np.stack([rotate(q[t], int(positions[t]), theta) for t in range(T)])
    k = np.stack([rotate(k[t], int(positions[t]), theta) for t in range(T)])
    out, picked = np.zeros((T, x.shape[1])), []
    for t in range(T):
        if documents[t] < 0:
            picked.append([])
            continue
        same = [s for s in range(T) if documents[s] == documents[t]]
        distance = {s: int(positions[t]) - int(positions[s]) for s in same}
        near = [s for s in same if 0 <= distance[s] < window]
        far = [s for s in same if window <= distance[s] < window + bank_size]
        answers, of_token = [], []
        for h in range(heads):
            group = h // (heads // kv_heads)
            local = k[near, group] @ q[t, h] / np.sqrt(q.shape[-1])
            products = k_bank[far, group] @ q_bank[t, h]
            best = sorted(range(len(far)), key=lambda i: (-products[i], positions[far[i]]))[:top_k]
            slots = [far[i] for i in best]
            scores = products[best] * np.exp(parameters["log_scale"][h])
            of_token.append([int(positions[s]) for s in slots])
            if join == "softmax":
                weights = softmax(np.concatenate([local, scores]))
                answers.append(weights @ v[near + slots, group])
                continue
            answer = softmax(local) @ v[near, group]
            if slots:
                share = 1 / (1 + np.exp(-parameters["gate"][h]))
                answer = share * (softmax(scores) @ v[slots, group]) + (1 - share) * answer
            answers.append(answer)
        out[t] = np.concatenate(answers) @ parameters["output"]
        picked.append(of_token)
    return out, picked
