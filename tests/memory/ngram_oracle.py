"""NGramMemory token by token: addresses in Python's integers, the layer in float64.

Parameters are dicts of float64 arrays. Nothing here knows of memtrain or JAX.
"""

from __future__ import annotations

import hashlib

import numpy as np
from memory_oracles import rms_normalize, silu


def multipliers(seed: int, order: int) -> list[int]:
    drawn = (hashlib.sha256(f"{seed}/{order}/{i}".encode()).digest() for i in range(order))
    return [int.from_bytes(d[:4], "little") | 2**31 | 1 for d in drawn]


def row_of(ngram: list[int | None], prime: int, seed: int = 0) -> int:
    """The row in its part: ids newest first, None where the document has no token."""
    mixed = 0
    for c, a in zip(ngram, multipliers(seed, len(ngram)), strict=True):
        mixed ^= 0 if c is None else (c + 1) * a
    return mixed % prime


def next_primes(least: int, count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        if least > 1 and all(least % d for d in range(2, int(least**0.5) + 1)):
            found.append(least)
        least += 1
    return found


def addresses(
    ids: list[int],
    documents: list[int],
    *,
    orders: tuple[int, ...],
    heads: int,
    slots: int,
    seed: int = 0,
) -> np.ndarray:
    """One row of tokens: [T, K] table rows, -1 where the document is negative."""
    primes = next_primes(slots, len(orders) * heads)
    found = []
    for t, document in enumerate(documents):
        of_token = []
        for part, prime in enumerate(primes):
            order = orders[part // heads]
            inside = [s >= 0 and documents[s] == document for s in range(t, t - order, -1)]
            ngram = [ids[t - ago] if inside[ago] else None for ago in range(order)]
            row = sum(primes[:part]) + row_of(ngram, prime, seed)
            of_token.append(row if document >= 0 else -1)
        found.append(of_token)
    return np.array(found)


def ngram(
    x: np.ndarray,
    rows: np.ndarray,
    documents: np.ndarray,
    parameters: dict[str, np.ndarray],
    table: np.ndarray,
    *,
    dilation: int,
    signed_root: bool,
) -> np.ndarray:
    """One row of tokens, x [T, D], rows [T, K]; 0 where the document is negative."""
    T, D = x.shape
    u, y = np.zeros((T, D)), np.zeros((T, D))
    taps = parameters["taps"]
    for t in range(T):
        if documents[t] < 0:
            continue
        read = table[rows[t]] * np.sqrt(table.shape[1])
        e = read.T.reshape(-1)  # first numbers of all rows, then second ones, ...
        q = rms_normalize(x[t]) * parameters["query_norm"]
        k = rms_normalize(e @ parameters["key"]) * parameters["key_norm"]
        score = q @ k / np.sqrt(D)
        if signed_root:
            score = np.sign(score) * np.sqrt(abs(score))
        u[t] = (e @ parameters["value"]) / (1 + np.exp(-score))
        mixed = np.zeros(D)
        for i in range(len(taps)):
            s = t - i * dilation
            if s >= 0 and documents[s] == documents[t]:
                mixed += taps[i] * rms_normalize(u[s]) * parameters["conv_norm"]
        y[t] = silu(mixed) + u[t]
    return y
