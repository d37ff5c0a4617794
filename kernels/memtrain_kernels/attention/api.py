"""The public attention function: checks its arguments, picks the backend, joins the results."""

from __future__ import annotations

from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from memtrain_kernels.attention.backends import attend_with, record, resolve_backend
from memtrain_kernels.attention.capabilities import Problem
from memtrain_kernels.attention.merge import Partial, join_sink_logits, merge
from memtrain_kernels.attention.spec import AttentionSpec


IntArray = jax.Array | np.ndarray


@overload
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    spec: AttentionSpec = ...,
    q_positions: IntArray | None = ...,
    kv_positions: IntArray | None = ...,
    q_segments: IntArray | None = ...,
    kv_segments: IntArray | None = ...,
    sink_logits: jax.Array | None = ...,
    prior: Partial | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> jax.Array: ...
@overload
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    spec: AttentionSpec = ...,
    q_positions: IntArray | None = ...,
    kv_positions: IntArray | None = ...,
    q_segments: IntArray | None = ...,
    kv_segments: IntArray | None = ...,
    sink_logits: jax.Array | None = ...,
    prior: Partial | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> Partial: ...
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    spec: AttentionSpec = AttentionSpec(),  # noqa: B008 (frozen)
    q_positions: IntArray | None = None,
    kv_positions: IntArray | None = None,
    q_segments: IntArray | None = None,
    kv_segments: IntArray | None = None,
    sink_logits: jax.Array | None = None,
    prior: Partial | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> jax.Array | Partial:
    """Softmax attention, blockwise, with the log-sum-exp as a differentiable output.

    Shapes: q [B, T, H, D]; k [B, S, Hkv, D]; v [B, S, Hkv, Dv], H a multiple of Hkv (query head h
    reads key head h // (H / Hkv)). Positions and segments are int32 [B, T] and [B, S], or [T] and
    [S] when the whole batch shares them. Positions default to 0..T-1 and 0..S-1, segments to one.
    A negative segment matches nothing, not even itself: padding.

    prior: (o [B, T, H, Dv], lse [B, T, H]), the result over other keys, to be merged with.
    sink_logits: [H] learned logits that join the denominator, once, after that merge; give them
    only in the last of several calls.

    Returns out [B, T, H, Dv] in q's dtype and, on request, lse [B, T, H] in float32: the log of
    the whole denominator (prior and sink logits included). A query that sees nothing has out
    exactly 0 and lse -inf, and passes back no gradient. Scores, softmax and sums are float32
    whatever the inputs; the matrix products' operands keep the inputs' dtype.

    backend: "xla" (blockwise, O(T) memory), "reference" (dense; differentiable to any order),
    "tpu", "hopper", "cudnn" (each for what its table says), or None to choose; `explain` tells the
    choice. Raises ValueError for shapes, dtypes or backends that do not fit.

    Blockwise softmax: Milakov and Gimelshein 2018 (arXiv 1805.02867), FlashAttention
    (arXiv 2205.14135).
    """
    _check_arrays(q, k, v)
    B, T, H, _ = q.shape
    S, E = k.shape[1], v.shape[3]
    q_pos = _tokens("q_positions", q_positions, B, T)
    kv_pos = _tokens("kv_positions", kv_positions, B, S)
    q_seg = _tokens("q_segments", q_segments, B, T)
    kv_seg = _tokens("kv_segments", kv_segments, B, S)
    if spec.ordered and T != S:
        raise ValueError(
            f"AttentionSpec.ordered promises that q and kv are the same tokens, "
            f"but q has {T} and k has {S}: leave ordered=False"
        )
    _check_extras(sink_logits, prior, B, T, H, E)

    problem = Problem.of(
        q,
        k,
        v,
        spec,
        positions=q_pos is not None or kv_pos is not None,
        segments=q_seg is not None or kv_seg is not None,
        lse=return_lse or prior is not None or sink_logits is not None,
    )
    name, reason = resolve_backend(backend, problem)
    record(name, reason)
    o, lse = attend_with(name)(q, k, v, q_pos, kv_pos, q_seg, kv_seg, spec)
    if prior is not None:
        o, lse = merge((o, lse), (prior[0].astype(o.dtype), prior[1].astype(lse.dtype)))
    if sink_logits is not None:
        o, lse = join_sink_logits((o, lse), sink_logits)
    out = o.astype(q.dtype)
    return (out, lse) if return_lse else out


def _check_arrays(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 4:
            raise ValueError(
                f"{name} has shape {array.shape}: give [batch, tokens, heads, head_dim]"
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {array.dtype}: give a floating dtype")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}: give one dtype")
    B, _, H, D = q.shape
    if k.shape[0] != B or k.shape[3] != D:
        raise ValueError(
            f"k has shape {k.shape}: for q {q.shape} give [{B}, tokens, kv_heads, {D}]"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has shape {v.shape}: for k {k.shape} give {[*k.shape[:3], 'any']}")
    if k.shape[2] == 0 or H % k.shape[2]:
        raise ValueError(
            f"q has {H} heads and k has {k.shape[2]}: query heads must be a multiple of key heads"
        )
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        raise ValueError(f"empty attention: q {q.shape}, k {k.shape}, v {v.shape}")


def _tokens(name: str, array: IntArray | None, batch: int, length: int) -> jax.Array | None:
    """[length] or [batch, length] integers as [1 or batch, length]; None stays None."""
    if array is None:
        return None
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {array.dtype}: give int32")
    if array.shape == (length,):
        array = array[None]
    elif array.shape not in ((batch, length), (1, length)):
        raise ValueError(f"{name} has shape {array.shape}: give [{batch}, {length}] or [{length}]")
    return jnp.asarray(array, jnp.int32)


def _check_extras(
    sink_logits: jax.Array | None, prior: Partial | None, B: int, T: int, H: int, E: int
) -> None:
    if sink_logits is not None and sink_logits.shape != (H,):
        raise ValueError(f"sink_logits has shape {sink_logits.shape}: give one logit a head, [{H}]")
    if prior is not None:
        o, lse = prior
        if o.shape != (B, T, H, E) or lse.shape != (B, T, H):
            raise ValueError(
                f"prior has shapes o {o.shape}, lse {lse.shape}: "
                f"give o [{B}, {T}, {H}, {E}] and lse [{B}, {T}, {H}]"
            )
