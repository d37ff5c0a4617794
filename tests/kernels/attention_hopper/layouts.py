"""Positions and segments that attention is called with: int32 [B, T] and [B, S] each."""

from __future__ import annotations

import numpy as np


def tokens(layout: str, B: int, T: int, S: int, seed: int = 0):
    """(q_pos, kv_pos, q_seg, kv_seg) as NumPy arrays, and which of them the call leaves out."""
    rng = np.random.default_rng(seed)
    q_pos = np.broadcast_to(np.arange(T), (B, T)).astype(np.int32)
    kv_pos = np.broadcast_to(np.arange(S), (B, S)).astype(np.int32)
    q_seg, kv_seg = np.zeros((B, T), np.int32), np.zeros((B, S), np.int32)
    if layout == "default":
        return (q_pos, kv_pos, q_seg, kv_seg), (None,) * 4
    if layout == "packed":  # documents one after the other, then padding
        assert T == S
        cuts = np.sort(rng.integers(1, T - 20, (B, 3)), axis=1)
        q_seg = (np.arange(T)[None, :, None] >= cuts[:, None]).sum(-1).astype(np.int32)
        first = np.argmax(q_seg[:, :, None] == q_seg[:, None, :], axis=2)
        q_pos = (q_pos - first).astype(np.int32)
        q_seg[:, T - 15 :] = -1
        kv_pos, kv_seg = q_pos, q_seg
    elif layout == "shuffled":  # a ring buffer, a far memory: any order, positions beyond S
        kv_pos = rng.permuted(kv_pos, axis=1)
        q_pos = (q_pos + S // 2)[:, ::-1].copy()
        q_seg = rng.integers(-1, 2, (B, T)).astype(np.int32)
        kv_seg = rng.integers(-1, 2, (B, S)).astype(np.int32)
    elif layout == "zigzag":  # the first and the last piece of a longer sequence
        half = T // 2
        q_pos = np.concatenate([np.arange(half), 1000 + np.arange(T - half)])[None].astype(np.int32)
        kv_pos = (np.arange(S)[None] + 700).astype(np.int32)
        q_seg, kv_seg = q_seg[:1], kv_seg[:1]
    else:
        raise AssertionError(layout)
    arrays = (q_pos, kv_pos, q_seg, kv_seg)
    return arrays, arrays
