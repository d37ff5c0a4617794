"""The blockwise backend in plain XLA: O(T) memory, forward and backward, any device."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from memtrain_kernels.attention.masks import fill_defaults, visible
from memtrain_kernels.attention.spec import AttentionSpec


def attend(q, k, v, q_pos, kv_pos, q_seg, kv_seg, spec):
    by_index = spec.ordered or (q_pos is None and kv_pos is None)
    tokens = fill_defaults(q.shape[1], k.shape[1], q_pos, kv_pos, q_seg, kv_seg)
    return _attend(q, k, v, *tokens, spec, by_index)


def _ranges(spec, T, S, by_index):
    bq = min(spec.block_q or 128, T)
    for lo in range(0, T, bq):
        hi = min(lo + bq, T)
        kv_lo, kv_hi = 0, S
        if by_index and spec.causal:
            kv_hi = min(hi, S)
        if by_index and spec.window is not None and not spec.sink_tokens:
            kv_lo = max(0, min(lo - spec.window + 1, S))
        yield lo, hi, kv_lo, max(kv_hi, kv_lo)


def _scores(q_BKRD, k_BKSD, seen, spec, G):
    s = jnp.einsum("bkrd,bksd->bkrs", q_BKRD, k_BKSD, preferred_element_type=jnp.float32)
    s = s * spec.scale_for(q_BKRD.shape[-1])
    if spec.soft_cap is not None:
        s = spec.soft_cap * jnp.tanh(s / spec.soft_cap)
    return s


def _seen(spec, tokens, lo, hi, a, b, G):
    q_pos, kv_pos, q_seg, kv_seg = tokens
    seen = visible(
        spec,
        q_pos[:, lo:hi, None],
        kv_pos[:, None, a:b],
        q_seg[:, lo:hi, None],
        kv_seg[:, None, a:b],
    )
    return jnp.repeat(seen, G, axis=1)[:, None] if G > 1 else seen[:, None]


def _fold(x_BTHD, K):
    B, T, H, D = x_BTHD.shape
    G = H // K
    return x_BTHD.reshape(B, T, K, G, D).transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, D)


def _unfold(x_BKRD, G):
    B, K, R, D = x_BKRD.shape
    return x_BKRD.reshape(B, K, R // G, G, D).transpose(0, 2, 1, 3, 4).reshape(B, R // G, K * G, D)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _attend(q, k, v, q_pos, kv_pos, q_seg, kv_seg, spec, by_index):
    return _forward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, spec, by_index)[0]


def _forward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, spec, by_index):
    tokens = (q_pos, kv_pos, q_seg, kv_seg)
    B, T, H, D = q.shape
    S, K, E = v.shape[1:]
    G = H // K
    q_, k_, v_ = _fold(q, K), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    outs, lses = [], []
    for lo, hi, a, b in _ranges(spec, T, S, by_index):
        if b == a:
            outs.append(jnp.zeros((B, K, (hi - lo) * G, E), jnp.float32))
            lses.append(jnp.full((B, K, (hi - lo) * G), -jnp.inf))
            continue
        seen = _seen(spec, tokens, lo, hi, a, b, G)
        s = _scores(q_[:, :, lo * G : hi * G], k_[:, :, a:b], seen, spec, G)
        m = jnp.max(jnp.where(seen, s, -1e30), axis=-1, keepdims=True)
        p = jnp.where(seen, jnp.exp(s - m), 0)
        l = jnp.sum(p, axis=-1, keepdims=True)
        live = l > 0
        o = jnp.einsum(
            "bkrs,bkse->bkre", p.astype(v.dtype), v_[:, :, a:b], preferred_element_type=jnp.float32
        )
        safe = jnp.where(live, l, 1)
        outs.append(o / safe)
        lses.append(jnp.where(live, m + jnp.log(safe), -jnp.inf)[..., 0])
    o = jnp.concatenate(outs, 2)
    lse = jnp.concatenate(lses, 2)
    return (_unfold(o, G), _unfold(lse[..., None], G)[..., 0]), (q_, k_, v_, tokens, o, lse)


def _fwd(q, k, v, q_pos, kv_pos, q_seg, kv_seg, spec, by_index):
    return _forward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, spec, by_index)


def _bwd(spec, by_index, res, cotangents):
    q_, k_, v_, tokens, o, lse = res
    do, dlse = cotangents
    B, K, R, D = q_.shape
    S = k_.shape[2]
    T = tokens[0].shape[1]
    G = R // T
    do = _fold(do, K)
    dlse = _fold(dlse[..., None], K)
    dtype = q_.dtype
    delta = jnp.sum(do * o, -1, keepdims=True) - dlse
    dk = jnp.zeros(k_.shape, jnp.float32)
    dv = jnp.zeros(v_.shape, jnp.float32)
    dqs = []
    scale = spec.scale_for(D)
    for lo, hi, a, b in _ranges(spec, T, S, by_index):
        rows = slice(lo * G, hi * G)
        if b == a:
            dqs.append(jnp.zeros_like(q_[:, :, rows], jnp.float32))
            continue
        seen = _seen(spec, tokens, lo, hi, a, b, G)
        s = _scores(q_[:, :, rows], k_[:, :, a:b], seen, spec, G)
        p = jnp.where(seen, jnp.exp(s - lse[:, :, rows, None]), 0)
        do_ = do[:, :, rows].astype(dtype)
        dp = jnp.einsum("bkre,bkse->bkrs", do_, v_[:, :, a:b], preferred_element_type=jnp.float32)
        ds = p * (dp - delta[:, :, rows])
        if spec.soft_cap is not None:
            ds = ds * (1 - (s / spec.soft_cap) ** 2)
        ds = jnp.where(seen, ds * scale, 0).astype(dtype)
        dv = dv.at[:, :, a:b].add(
            jnp.einsum("bkrs,bkre->bkse", p.astype(dtype), do_, preferred_element_type=jnp.float32)
        )
        dk = dk.at[:, :, a:b].add(
            jnp.einsum("bkrs,bkrd->bksd", ds, q_[:, :, rows], preferred_element_type=jnp.float32)
        )
        dqs.append(jnp.einsum("bkrs,bksd->bkrd", ds, k_[:, :, a:b], preferred_element_type=jnp.float32))
    dq = _unfold(jnp.concatenate(dqs, 2), G).astype(dtype)
    none = tuple(np.zeros(t.shape, jax.dtypes.float0) for t in tokens)
    return dq, dk.transpose(0, 2, 1, 3).astype(dtype), dv.transpose(0, 2, 1, 3).astype(dtype), *none


_attend.defvjp(_fwd, _bwd)
