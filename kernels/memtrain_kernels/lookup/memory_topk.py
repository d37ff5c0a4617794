"""The public exact top-k over a large key set: its arguments, and the gradient of its scores."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from memtrain_kernels.lookup.arguments import Arguments, prepare
from memtrain_kernels.lookup.bag_gradient import sum_by_row
from memtrain_kernels.lookup.checks import Arrays
from memtrain_kernels.lookup.key_blocks import Keys
from memtrain_kernels.lookup.search import MaskFn, Plan, Queries, search
from memtrain_kernels.lookup.weighted_gather import bag
from memtrain_kernels.varying import vary_alike


def memory_topk(
    queries: Arrays,
    keys: Arrays,
    top_k: int,
    *,
    q_positions: Arrays | None = None,
    kv_positions: Arrays | None = None,
    q_segments: Arrays | None = None,
    kv_segments: Arrays | None = None,
    mask_fn: MaskFn | None = None,
    key_scales: Arrays | None = None,
    block_queries: int | None = None,
    block_keys: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The `top_k` keys of greatest inner product with each query, exactly, and without ever holding
    the scores of all keys.

    Shapes: queries [B, T, H, D]; keys [B or 1, S, Hkv, D], H a multiple of Hkv (query head h reads
    key head h // (H / Hkv)). Or plainly queries [M, D] and keys [S, D]. 1 <= top_k <= S.
    Returns (scores, indices) [B, T, H, k] or [M, k], best first: scores float32 (float64 for
    float64 operands), unscaled products in highest precision for float32 operands; indices int32
    into S. Where fewer than k keys are seen, the rest has score -inf and index -1.

    What a query sees: all keys; if segments are given, keys of its own segment (left out on one
    side they are 0 there; a negative segment matches nothing, not even itself); and of these what
    mask_fn(q_pos, kv_pos, q_seg, kv_seg) allows, a module-level function of int32 arrays that
    broadcast, giving bool. Positions and segments are int32 [B, T] and [B, S], or [T] and [S]
    ([M] and [S]); positions default to the indices.

    Ties go to the lower kv position (then, at equal positions, to the lower index): a key set
    given in another order, with its positions, gives the same scores and the same keys, to the
    bit. Keys whose (segment, position) do not ascend, from the first on or round a ring from some
    key on, are sorted at every call (O(S log S)).
    A NaN score counts, and comes back, as +inf; a score of -inf counts as not seen.

    key_scales: for int8 and float8 (e4m3fn, e5m2) keys, which need them: [B or 1, S, Hkv] (plain:
    [S]) a key or [Hkv] (plain: []) a head, positive; a score is scale * (query . stored key).

    The gradient of the scores reaches the queries and the keys that were picked, in fixed order
    and without atomics; the choice of keys has none, nor have int8 and float8 keys and their
    scales: differentiating by those raises.

    block_queries, block_keys: tokens and keys of a tile of scores; None lets the device choose. A
    tile whose queries and keys share no segment is skipped; so is one of which mask_fn, if it has a
    method `reaches(q_least, q_most, kv_least, kv_most)` of int32 [N], says that no query at a
    position of the one range sees a key at one of the other. Where the operands are sharded, call
    this, or `sharded_memory_topk`, inside `jax.shard_map`: under automatic sharding XLA gathers
    them.
    Raises ValueError for shapes, dtypes and values that do not fit.
    """
    return pick(
        prepare(
            queries,
            keys,
            top_k,
            q_positions,
            kv_positions,
            q_segments,
            kv_segments,
            mask_fn,
            key_scales,
            block_queries,
            block_keys,
        )
    )


def pick(arguments: Arguments) -> tuple[jax.Array, jax.Array]:
    """Scores and indices of a lookup, in the shape that was asked for."""
    a = arguments
    queries, q_positions, q_segments, *keys = vary_alike(
        a.queries, a.q_positions, a.q_segments, *a.keys
    )
    stored, scales, kv_positions, kv_segments = keys
    tokens = (q_positions, q_segments, kv_positions, kv_segments)
    scores, slots = _pick(a.plan, queries, stored, scales, tokens)
    return scores.reshape(a.shape), slots.reshape(a.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pick(
    plan: Plan, q_NTHD: jax.Array, keys_NSX: jax.Array, scales: jax.Array | None, tokens: Any
) -> tuple[jax.Array, jax.Array]:
    """Scores and slots [N, T, H, k]; X = K * D."""
    q_positions, q_segments, kv_positions, kv_segments = tokens
    N, T, H, D = q_NTHD.shape
    K, G = H // plan.group, plan.group
    rows_NKRD = q_NTHD.reshape(N, T, K, G, D).transpose(0, 2, 1, 3, 4).reshape(N, K, T * G, D)
    found = search(
        plan,
        Queries(rows_NKRD, q_positions, q_segments),
        Keys(keys_NSX, scales, kv_positions, kv_segments),
    )

    def unfold(x_NKRk: jax.Array) -> jax.Array:
        return x_NKRk.reshape(N, K, T, G, -1).transpose(0, 2, 1, 3, 4).reshape(N, T, H, -1)

    return unfold(found[0]), unfold(found[1])


def _forward(plan: Plan, q, keys, scales, tokens):
    for name, x in (("keys", keys), ("key_scales", scales)):
        if x is not None and x.perturbed and scales is not None:
            raise ValueError(
                f"{name} of a lookup in {keys.value.dtype} keys have no gradient: "
                f"give jax.lax.stop_gradient({name})"
            )
    # What tells the backward pass whether the keys' gradient is wanted is a matter of structure.
    wants_keys = () if keys.perturbed else None
    q, keys, scales, tokens = jax.tree.map(
        lambda x: x.value, (q, keys, scales, tokens), is_leaf=lambda x: hasattr(x, "perturbed")
    )
    scores, slots = _pick(plan, q, keys, scales, tokens)
    return (scores, slots), (q, keys, scales, slots, wants_keys)


def _backward(plan: Plan, saved, cotangents):
    q_NTHD, keys_NSX, scales, slots_NTHk, wants_keys = saved
    d_scores = cotangents[0]
    if isinstance(d_scores, SymbolicZero):
        return None, None, None, None
    N, T, H, D = q_NTHD.shape
    (batch, S), K = keys_NSX.shape[:2], H // plan.group
    # A key is a row of the table [batch * S * K, D], and a query's picks are its bag.
    n = jnp.arange(batch, dtype=jnp.int32)[:, None, None, None]
    head = jnp.arange(H, dtype=jnp.int32)[:, None] // plan.group
    slots_NTHk = jnp.where(slots_NTHk < 0, -1, (n * S + slots_NTHk) * K + head)
    slots_Mk, weights_Mk = (x.reshape(N * T * H, -1) for x in (slots_NTHk, d_scores))
    table, q_MD = keys_NSX.reshape(-1, D), q_NTHD.reshape(-1, D)

    d_keys = None
    if wants_keys is not None:
        d_keys = sum_by_row(slots_Mk, weights_Mk, q_MD, table.shape[0])
        d_keys = d_keys.reshape(keys_NSX.shape).astype(keys_NSX.dtype)
    if scales is not None:
        scales = jnp.broadcast_to(scales, (batch, S, K)).reshape(-1)
        weights_Mk = weights_Mk * scales[jnp.maximum(slots_Mk, 0)]
    d_q = bag(table, slots_Mk, weights_Mk)
    return d_q.reshape(q_NTHD.shape).astype(q_NTHD.dtype), d_keys, None, None


_pick.defvjp(_forward, _backward, symbolic_zeros=True)
