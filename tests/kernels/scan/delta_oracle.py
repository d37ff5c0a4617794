"""The gated delta rule as it is written down, token by token in float64, and runs to try it on.

Arithmetic is NumPy's, and analytic in every argument: given complex numbers it gives exact
directional derivatives (complex step: Squire and Trapp 1998).
"""

from __future__ import annotations

from typing import Any

import numpy as np


ROWS, TOKENS, KEY_HEADS, HEADS, KEY_DIM, VALUE_DIM = 2, 150, 2, 4, 8, 6
"""Three chunks of 64, the last one ragged."""


def delta_rule(run: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [B, T, H, V], those of invalid tokens 0, and the state after [B, H, K, V].

    S = diag(e^g) S - k ((b * k)^T diag(e^g) S) + k (w * v)^T.
    """
    B, T, _, K = run["query"].shape
    H, V = run["value"].shape[2:]
    kind = complex if any(np.iscomplexobj(x) for x in run.values()) else float
    wide = lambda x: x.astype(kind)  # noqa: E731
    query, key = (np.repeat(wide(run[n]), H // run[n].shape[2], axis=2) for n in ("query", "key"))

    def full(name: str, width: int, otherwise: float) -> np.ndarray:
        x = run.get(name)
        if x is None:
            return np.full((B, T, H, width), otherwise, kind)
        return np.broadcast_to(wide(x if x.ndim == 4 else x[..., None]), (B, T, H, width))

    decay, erase = np.exp(full("log_decay", K, 0.0)), full("erase", K, 0.0)
    value = full("write", V, 1.0) * wide(run["value"])
    S = wide(run["state"]).copy()
    out = np.zeros((B, T, H, V), kind)
    for t in range(T):
        begun = run["starts"][:, t, None, None, None]
        faded = decay[:, t, ..., None] * np.where(begun, 0, S)
        erased = np.einsum("bhk,bhkv->bhv", erase[:, t] * key[:, t], faded)
        new = faded + key[:, t, ..., None] * (value[:, t] - erased)[:, :, None]
        valid = run["valid"][:, t, None, None, None]
        S = np.where(valid, new, S)
        read = np.einsum("bhk,bhkv->bhv", query[:, t], S) * K**-0.5
        out[:, t] = np.where(valid[..., 0], read, 0)
    return out, S


def draw_run(
    rng: np.random.Generator,
    decay: str | None,
    erase: str | None,
    write: str | None,
    tokens: int = TOKENS,
) -> dict[str, Any]:
    """float32 arguments, each None, one a "head" or one a "channel". Documents, padding on either
    side; decays from next to nothing to e^-12 a token."""
    B, T, G, H, K, V = ROWS, tokens, KEY_HEADS, HEADS, KEY_DIM, VALUE_DIM
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731

    def by(what: str | None, width: int, function: Any) -> np.ndarray | None:
        if what is None:
            return None
        return function(normal(*((B, T, H) if what == "head" else (B, T, H, width))))

    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    key = normal(B, T, G, K)
    starts, valid = rng.random((B, T)) < 0.03, np.ones((B, T), bool)
    valid[0, :5] = False
    valid[1, -7:] = False
    return {
        "query": normal(B, T, G, K),
        "key": key / np.linalg.norm(key, axis=-1, keepdims=True),
        "value": normal(B, T, H, V),
        "log_decay": by(decay, K, lambda x: -np.minimum(np.exp(2 * x - 1), 12).astype(np.float32)),
        "erase": by(erase, K, sigmoid),
        "write": by(write, V, sigmoid),
        "starts": starts,
        "valid": valid,
        "state": normal(B, H, K, V),
    }
