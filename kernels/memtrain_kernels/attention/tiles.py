"""The arithmetic of one tile of scores, shared by the unrolled and the looped form.

Axes: B batch, K key heads, G query heads of a key head, D key dim, E value dim, S keys of a tile,
R = tokens * G its query rows, token-major: the group is folded into the rows, so that grouped
queries need no repeated keys. Row statistics are [B, K, R, 1].

Gradients of keys and values are kept transposed, [B, K, D, S]: the product that contracts the rows
then reads the tile of probabilities as it lies (several times faster in XLA on CPU).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memtrain_kernels.attention.masks import visible
from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.varying import vary_as


class Tokens(NamedTuple):
    """int32 [B or 1, tokens] each."""

    q_pos: jax.Array
    kv_pos: jax.Array
    q_seg: jax.Array
    kv_seg: jax.Array


class Scaling(NamedTuple):
    """The spec's scale, on q where that is exact (it saves a pass), else on the scores."""

    on_q: float
    on_scores: float


class Running(NamedTuple):
    """A softmax under way: greatest score and total of exponentials [B,K,R,1], acc [B,K,R,E]."""

    m: jax.Array
    total: jax.Array
    acc: jax.Array


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """einsum that accumulates, and returns, in float32 (or wider inputs' own dtype)."""
    return jnp.einsum(subscripts, x, y, preferred_element_type=accumulation_dtype(x.dtype))


def fold(x_BTHD: jax.Array, num_kv_heads: int) -> jax.Array:
    """[B, T, H, D] to rows: [B, K, T * G, D]."""
    B, T, H, D = x_BTHD.shape
    x = x_BTHD.reshape(B, T, num_kv_heads, H // num_kv_heads, D)
    return x.transpose(0, 2, 1, 3, 4).reshape(B, num_kv_heads, -1, D)


def unfold(x_BKRD: jax.Array, group: int) -> jax.Array:
    """Rows back to [B, T, H, D]."""
    B, K, R, D = x_BKRD.shape
    x = x_BKRD.reshape(B, K, R // group, group, D).transpose(0, 2, 1, 3, 4)
    return x.reshape(B, R // group, K * group, D)


def masked_scores(
    spec: AttentionSpec,
    scaling: Scaling,
    q_BKRD: jax.Array,
    k_BKSD: jax.Array,
    tokens: Tokens,
) -> jax.Array:
    """Scaled, capped scores [B, K, R, S], -inf where the query does not see the key."""
    return _mask(spec, scores(spec, scaling, q_BKRD, k_BKSD), tokens)


def scores(
    spec: AttentionSpec, scaling: Scaling, q_BKRD: jax.Array, k_BKSD: jax.Array
) -> jax.Array:
    """Scaled, capped scores [B, K, R, S] of a tile that every query sees in full."""
    return cap(spec, scaling, product("bkrd,bksd->bkrs", q_BKRD, k_BKSD))


def cap(spec: AttentionSpec, scaling: Scaling, s: jax.Array) -> jax.Array:
    """Scores from products: the scale, if it was not on q, and the soft cap."""
    if scaling.on_scores != 1:
        s = s * scaling.on_scores
    if spec.soft_cap is not None:
        s = spec.soft_cap * jnp.tanh(s / spec.soft_cap)
    return s


def ceiling(spec: AttentionSpec, tokens: Tokens, dtype: jnp.dtype) -> jax.Array:
    """+inf where a query sees a key, else -inf: [B or 1, T, S], for all heads.

    A minimum with it masks scores: XLA on CPU vectorises that where a select inside the row maximum
    costs five times as much.
    """
    t = tokens
    seen_BTS = visible(
        spec, t.q_pos[:, :, None], t.kv_pos[:, None], t.q_seg[:, :, None], t.kv_seg[:, None]
    )
    return jnp.where(seen_BTS, jnp.inf, -jnp.inf).astype(dtype)


def _mask(spec: AttentionSpec, s_BKRS: jax.Array, tokens: Tokens) -> jax.Array:
    B, K, R, S = s_BKRS.shape
    ceiling_BTS = ceiling(spec, tokens, s_BKRS.dtype)
    T = ceiling_BTS.shape[1]
    s_BKTGS = jnp.minimum(s_BKRS.reshape(B, K, T, R // T, S), ceiling_BTS[:, None, :, None])
    return s_BKTGS.reshape(B, K, R, S)


def start(s_BKRS: jax.Array, v_BKSE: jax.Array) -> Running:
    """The softmax over a first tile."""
    # Kept as it is, masked: recomputing the mask inside the exponential costs more than reading it,
    # and XLA on CPU fuses exponential, sum and product only over an array that exists.
    s_BKRS = lax.optimization_barrier(s_BKRS)
    m = jnp.max(s_BKRS, axis=-1, keepdims=True)
    p = jnp.exp(s_BKRS - finite(m))
    return Running(m, jnp.sum(p, axis=-1, keepdims=True), _values(p, v_BKSE))


def absorb(running: Running, s_BKRS: jax.Array, v_BKSE: jax.Array) -> Running:
    """The softmax over one more tile: rescale what was summed to the new maximum."""
    m = jnp.maximum(running.m, jnp.max(s_BKRS, axis=-1, keepdims=True))
    p = jnp.exp(s_BKRS - finite(m))
    fade = jnp.exp(running.m - finite(m))
    return Running(
        m,
        running.total * fade + jnp.sum(p, axis=-1, keepdims=True),
        running.acc * fade + _values(p, v_BKSE),
    )


def nothing(q_BKRD: jax.Array, E: int) -> Running:
    """The softmax over no key, for these query rows."""
    rows, dtype = q_BKRD.shape[:3], accumulation_dtype(q_BKRD.dtype)
    return Running(
        vary_as(jnp.full((*rows, 1), -jnp.inf, dtype), q_BKRD),
        vary_as(jnp.zeros((*rows, 1), dtype), q_BKRD),
        vary_as(jnp.zeros((*rows, E), dtype), q_BKRD),
    )


def finish(running: Running) -> tuple[jax.Array, jax.Array]:
    """o [B, K, R, E] and lse [B, K, R, 1]; 0 and -inf where nothing was seen."""
    m, total, acc = running
    # The greatest score adds exp(0) = 1, so a total < 1 says that nothing was seen; m is -inf.
    total = jnp.maximum(total, 1)
    return acc / total, m + jnp.log(total)


class Rows(NamedTuple):
    """What the backward pass needs of a block of query rows."""

    q_BKRD: jax.Array
    q_BKDR: jax.Array
    do_BKRE: jax.Array
    do_BKER: jax.Array
    lse_BKR1: jax.Array  # 0 where nothing was seen: the mask alone then gives p = 0
    delta_BKR1: jax.Array  # rowsum(do * o) - dlse


def tile_gradients(
    spec: AttentionSpec,
    scaling: Scaling,
    rows: Rows,
    k_BKSD: jax.Array,
    v_BKSE: jax.Array,
    tokens: Tokens | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A tile's share of dq [B, K, R, D], dk [B, K, D, S], dv [B, K, E, S], before the scales.

    Without tokens, every query sees every key.
    """
    dtype = k_BKSD.dtype
    s_BKRS = scores(spec, scaling, rows.q_BKRD, k_BKSD)
    masked = s_BKRS if tokens is None else _mask(spec, s_BKRS, tokens)
    p_BKRS = jnp.exp(masked - rows.lse_BKR1)
    dp_BKRS = product("bkre,bkse->bkrs", rows.do_BKRE, v_BKSE)
    ds_BKRS = p_BKRS * (dp_BKRS - rows.delta_BKR1)
    if spec.soft_cap is not None:
        ds_BKRS = ds_BKRS * (1 - jnp.square(s_BKRS / spec.soft_cap))
    p_BKRS, ds_BKRS = p_BKRS.astype(dtype), ds_BKRS.astype(dtype)
    return (
        product("bkrs,bksd->bkrd", ds_BKRS, k_BKSD),
        product("bkdr,bkrs->bkds", rows.q_BKDR, ds_BKRS),
        product("bker,bkrs->bkes", rows.do_BKER, p_BKRS),
    )


def _values(p_BKRS: jax.Array, v_BKSE: jax.Array) -> jax.Array:
    return product("bkrs,bkse->bkre", p_BKRS.astype(v_BKSE.dtype), v_BKSE)


def finite(m: jax.Array) -> jax.Array:
    """The greatest score as a shift: 0 where nothing was seen, for -inf - -inf is no number."""
    return jnp.where(m == -jnp.inf, 0, m)
