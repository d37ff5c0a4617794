"""The public attention function: checks its arguments, picks the backend, joins the results."""

from __future__ import annotations

from typing import Any, Literal, overload

import jax

from memtrain_kernels.attention.backends import attend_with, record, resolve_backend
from memtrain_kernels.attention.checks import IntArray, checked
from memtrain_kernels.attention.merge import Partial, join_sink_logits, merge
from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.partition import current_partition


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

    Under `partitioned(..., sequence=...)`, where the layout splits the tokens of this call, it is
    `context_attention` over the devices.

    First derivatives in reverse mode; for others, and for forward mode, use "reference". The
    environment and the device are looked at when a program is traced, not when it runs again.

    Blockwise softmax: Milakov and Gimelshein 2018 (arXiv 1805.02867), FlashAttention
    (arXiv 2205.14135).
    """
    given = (q_positions, kv_positions, q_segments, kv_segments)
    problem, tokens = checked(q, k, v, spec, given, sink_logits, prior, return_lse)
    part = current_partition()
    if part is not None and part.splits_tokens:
        from memtrain_kernels.context.partition import attention_over_tokens, sequence_partition

        part = sequence_partition(problem.T, problem.S)
        if part is not None:
            names = ("q_positions", "kv_positions", "q_segments", "kv_segments")
            named: dict[str, Any] = dict(zip(names, tokens, strict=True))
            joined = attention_over_tokens(part, q, k, v, spec, named, sink_logits, prior, backend)
            return joined if return_lse else joined[0]
    name, reason = resolve_backend(backend, problem)
    record(name, reason)
    o, lse = attend_with(name)(q, k, v, *tokens, spec)
    if prior is not None:
        o, lse = merge((o, lse), (prior[0].astype(o.dtype), prior[1].astype(lse.dtype)))
    if sink_logits is not None:
        o, lse = join_sink_logits((o, lse), sink_logits)
    out = o.astype(q.dtype)
    return (out, lse) if return_lse else out
