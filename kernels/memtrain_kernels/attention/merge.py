"""Joining partial attention results under one softmax, exactly and differentiably."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


Partial = tuple[jax.Array, jax.Array]


def merge(first: Partial, second: Partial) -> Partial:
    """The result over the union of two disjoint sets of keys, from the result over each.

    Each is (o [B, T, H, Dv], lse [B, T, H]): o normalised by its own denominator, lse the log of
    that denominator, -inf (and o zero) where nothing was seen. Returns the same pair, o in the
    promoted dtype of both, lse float32. Differentiable in all four to any order; no NaN in value
    or gradient where one or both lse are -inf.
    """
    (o1, lse1), (o2, lse2) = first, second
    out_dtype = jnp.promote_types(o1.dtype, o2.dtype)
    acc_dtype = jnp.promote_types(out_dtype, jnp.float32)
    # The shift cancels out, so no gradient needs to pass through it.
    shift = lax.stop_gradient(_finite_or_zero(jnp.maximum(lse1, lse2)))
    w1, w2 = jnp.exp(lse1 - shift), jnp.exp(lse2 - shift)
    total = w1 + w2
    seen = total > 0
    safe_total = jnp.where(seen, total, 1)
    o = (
        o1.astype(acc_dtype) * (w1 / safe_total)[..., None]
        + o2.astype(acc_dtype) * (w2 / safe_total)[..., None]
    )
    lse = jnp.where(seen, shift + jnp.log(safe_total), -jnp.inf)
    return o.astype(out_dtype), lse


def join_sink_logits(partial: Partial, sink_logits_H: jax.Array) -> Partial:
    """Let one learned logit a head join the denominator: a key whose value is zero.

    Do it once, after the last merge. lse then counts the sink, so it is finite even where no key
    was seen.
    """
    o_BTHE, lse_BTH = partial
    sink_BTH = jnp.broadcast_to(sink_logits_H.astype(lse_BTH.dtype), lse_BTH.shape)
    shift = lax.stop_gradient(jnp.maximum(lse_BTH, sink_BTH))
    shift = _finite_or_zero(shift)
    w, w_sink = jnp.exp(lse_BTH - shift), jnp.exp(sink_BTH - shift)
    total = w + w_sink
    seen = total > 0  # false only where the sink logit is -inf and no key is seen
    safe_total = jnp.where(seen, total, 1)
    o = o_BTHE * (w / safe_total)[..., None].astype(o_BTHE.dtype)
    return o, jnp.where(seen, shift + jnp.log(safe_total), -jnp.inf)


def _finite_or_zero(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, 0)
