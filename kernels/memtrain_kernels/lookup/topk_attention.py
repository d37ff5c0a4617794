"""Attention to the best few keys of each query, out of more than attention could go through."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from memtrain_kernels.announce import say_once
from memtrain_kernels.lookup.memory_topk import memory_topk
from memtrain_kernels.lookup.search import MaskFn
from memtrain_kernels.lookup.sharded_gather import sharded_weighted_gather
from memtrain_kernels.lookup.visiting_topk import Best, best_of, visiting_topk
from memtrain_kernels.lookup.weighted_gather import weighted_gather
from memtrain_kernels.partition import current_partition, is_manual, region


class KeyedValues(NamedTuple):
    """Tokens that queries may look up. int32 positions and segments; a negative segment: none."""

    keys: jax.Array  # [B, S, Hkv, D]; int8 and float8 with scales
    values: jax.Array  # [B, S, Hkv, Dv]
    positions: jax.Array  # [B, S]
    segments: jax.Array  # [B, S]
    scales: jax.Array | None = None  # float32 [B, S, Hkv]


class TopKAttention(NamedTuple):
    """What came of it, and what was read."""

    out: jax.Array  # float32 [B, T, H, Dv]; 0 where nothing was seen
    lse: jax.Array  # float32 [B, T, H]: log-sum-exp of the scores that were read; -inf there
    weights: jax.Array  # float32 [B, T, H, k], best first
    positions: jax.Array  # int32 [B, T, H, k], of what was read; -1 where fewer were seen


def topk_attention(
    q: jax.Array,
    parts: Sequence[KeyedValues],
    top_k: int,
    *,
    q_positions: jax.Array,
    q_segments: jax.Array,
    mask_fn: MaskFn,
    trained_fn: MaskFn | None = None,
) -> TopKAttention:
    """softmax over the `top_k` greatest q . k of all parts together, and its sum of the values.

    Shapes: q [B, T, H, D], scaled as scores are meant to be; H a multiple of Hkv. q_positions,
    q_segments int32 [B, T]. A query sees the keys of its own segment that mask_fn(q_pos, kv_pos,
    q_seg, kv_seg) allows (see `memory_topk`); ties go to the lower position, then to the earlier
    part, then to the lower slot. The log-sum-exp is differentiable, so `merge` joins the result
    with other attention.

    Gradients reach the queries through what was read. Keys and values are constants, but for those
    of which trained_fn(q_pos, kv_pos, q_seg, kv_seg) holds, by query; not in int8 and float8.

    Under `partitioned`, each device searches for its own rows and heads. Where it says that tokens
    are sharded, so are the parts' slots, in equal runs: queries then go round the devices with what
    they have found, and values come from where they lie; one query alone is looked up by all.
    Slots or tokens that do not divide leave their part whole, which is said once.
    Raises ValueError for shapes and dtypes that do not fit.
    """
    part = current_partition()
    if part is None or part.mesh.size == 1 or is_manual():
        return _attend(q, tuple(parts), q_positions, q_segments, top_k, mask_fn, trained_fn)
    inner, outer = region(part)
    rows, over = (tuple(n for n in names if n not in outer) for names in (part.batch, part.heads))
    batch = part.axes(rows, q.shape[0])
    heads = part.axes(over, q.shape[2], parts[0].keys.shape[2])
    axis = part.sequence if part.splits_tokens and part.sequence not in outer else None
    T, sizes = q.shape[1], [p.positions.shape[1] for p in parts]
    if axis is not None:
        n = part.mesh.shape[axis]
        if any(size % n for size in sizes) or (T > 1 and T % n):
            say_once(
                f"lookup of {T} queries in {' + '.join(map(str, sizes))} keys is not split over "
                f"mesh axis {axis!r}, its operands are gathered: they must be multiples of {n}"
            )
            axis = None
    own = axis if T > 1 else None
    tokens = PartitionSpec(batch, own)
    content = PartitionSpec(batch, axis, heads, None)
    index = PartitionSpec(batch, axis)
    keyed = KeyedValues(content, content, index, index, PartitionSpec(batch, axis, heads))  # type: ignore[arg-type]
    specs = tuple(keyed if p.scales is not None else keyed._replace(scales=None) for p in parts)
    result = PartitionSpec(batch, own, heads, None)
    return jax.shard_map(
        lambda q, parts, pos, seg: _attend(
            q, parts, pos, seg, top_k, mask_fn, trained_fn, axis, alone=own is None
        ),
        **inner,
        in_specs=(result, specs, tokens, tokens),
        out_specs=TopKAttention(result, PartitionSpec(batch, own, heads), result, result),  # type: ignore[arg-type]
        check_vma=False,  # one query's result is alike on all devices, which is not known there
    )(q, tuple(parts), q_positions, q_segments)


def _attend(
    q: jax.Array,
    parts: tuple[KeyedValues, ...],
    q_positions: jax.Array,
    q_segments: jax.Array,
    top_k: int,
    mask_fn: MaskFn,
    trained_fn: MaskFn | None,
    axis: str | None = None,
    *,
    alone: bool = False,
) -> TopKAttention:
    """On one device's share. axis: over which slots are sharded, and tokens unless they are
    `alone`, the same on all its devices."""
    B, T, H, _ = q.shape
    best, firsts = _select(q, parts, q_positions, q_segments, top_k, mask_fn, axis, alone)
    trained = None
    if trained_fn is not None:
        at = lambda x: x[:, :, None, None]  # noqa: E731
        trained = trained_fn(at(q_positions), best.positions, at(q_segments), at(q_segments))
    scores = best.scores
    for part, first in zip(parts, firsts, strict=True):
        rows = _rows(best.slots, first, part, H, axis)
        keys = part.keys.astype(jnp.float32)
        if part.scales is not None:
            keys = keys * part.scales[..., None]
        for table, chosen in _by_training(_table(keys), rows, trained):
            scores = _with_gradient(axis, alone, q, table, chosen, scores)
    weights, lse = softmax(scores)
    out = jnp.zeros((B * T * H, parts[0].values.shape[-1]), jnp.float32)
    for part, first in zip(parts, firsts, strict=True):
        rows = _rows(best.slots, first, part, H, axis)
        flat = weights.reshape(B * T * H, -1)
        for table, chosen in _by_training(_table(part.values), rows, trained):
            out = out + _bag(axis, alone, table, chosen, flat).astype(jnp.float32)
    positions = jnp.where(best.slots < 0, -1, best.positions)
    return TopKAttention(out.reshape(B, T, H, -1), lse, weights, positions)


def softmax(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights over the last axis and their log-sum-exp; zeros and -inf where all are -inf."""
    top = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    seen = scores > -jnp.inf
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, scores, 0.0) - top), 0.0)
    total = jnp.sum(weights, axis=-1)
    safe = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, top[..., 0] + jnp.log(safe), -jnp.inf)
    return weights / safe[..., None], lse


def _select(q, parts, q_positions, q_segments, top_k, mask_fn, axis, alone):
    """The best of all parts, and the number that the first slot of each part has among all."""
    devices = 1 if axis is None else lax.axis_size(axis)
    sizes = [part.positions.shape[1] * devices for part in parts]
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = lax.stop_gradient(parts)

    def search(queries) -> Best:
        q, q_positions, q_segments = queries
        found = None
        for part, first in zip(parts, firsts, strict=True):
            share = part.positions.shape[1]
            scores, slots = memory_topk(
                q,
                part.keys,
                min(top_k, share),
                q_positions=q_positions,
                kv_positions=part.positions,
                q_segments=q_segments,
                kv_segments=part.segments,
                mask_fn=mask_fn,
                key_scales=part.scales,
            )
            flat = jnp.maximum(slots, 0).reshape(slots.shape[0], -1)
            positions = jnp.take_along_axis(part.positions, flat, axis=1).reshape(slots.shape)
            if axis is not None:
                first = first + lax.axis_index(axis) * share
            one = Best(scores, positions, jnp.where(slots < 0, -1, first + slots))
            found = one if found is None else best_of(found, one, top_k)
        assert found is not None
        return found

    queries = lax.stop_gradient((q, q_positions, q_segments))
    if axis is not None and not alone:
        return visiting_topk(queries, search, top_k, axis), firsts
    found = search(queries)
    if axis is not None:
        found = Best(*(lax.all_gather(x, axis, axis=3, tiled=True) for x in found))
        found = best_of(found, jax.tree.map(lambda x: x[..., :0], found), top_k)
    missing = [(0, 0)] * 3 + [(0, top_k - found.scores.shape[3])]
    fills = (-jnp.inf, -1, -1)
    pairs = zip(found, fills, strict=True)
    return Best(*(jnp.pad(x, missing, constant_values=fill) for x, fill in pairs)), firsts


def _rows(slots, first, part: KeyedValues, num_heads: int, axis: str | None) -> jax.Array:
    """[B * T * H, k]: rows of the part's table, of all devices one after another; -1 for none and
    for those of other parts."""
    B, S, K, _ = part.keys.shape
    devices = 1 if axis is None else lax.axis_size(axis)
    own = slots - first
    mine = (slots >= 0) & (own >= 0) & (own < S * devices)
    device, slot = own // S, own % S
    batch = jnp.arange(B, dtype=jnp.int32)[:, None, None, None]
    head = jnp.arange(num_heads, dtype=jnp.int32)[:, None] // (num_heads // K)
    row = ((device * B + batch) * S + slot) * K + head
    return jnp.where(mine, row, -1).reshape(-1, slots.shape[-1])


def _table(x_BSKD: jax.Array) -> jax.Array:
    """One row a token and head."""
    return x_BSKD.reshape(-1, x_BSKD.shape[-1])


def _by_training(table, rows, trained):
    """(table, rows) that are read as constants, and that are not."""
    constant = lax.stop_gradient(table)
    if trained is None:
        return [(constant, rows)]
    trained = trained.reshape(rows.shape)
    return [(constant, jnp.where(trained, -1, rows)), (table, jnp.where(trained, rows, -1))]


def _bag(axis: str | None, alone: bool, table, rows, weights) -> jax.Array:
    if axis is None:
        return weighted_gather(table, rows, weights)
    if not alone:
        return sharded_weighted_gather(table, rows, weights, axis=axis, split="rows")
    return lax.psum(_own_bag(axis, table, rows, weights), axis)


def _own_bag(axis: str, table, rows, weights) -> jax.Array:
    """Of the rows that this device has, for queries that all devices have."""
    first = lax.axis_index(axis) * table.shape[0]
    own = (rows >= first) & (rows < first + table.shape[0])
    return weighted_gather(table, jnp.where(own, rows - first, -1), weights)


def _with_gradient(axis, alone, q_BTHD, table, rows, scores):
    """The scores, which are those of these rows with q where rows are not -1, and their gradient
    to both."""
    return _attach(axis, alone, q_BTHD.reshape(-1, q_BTHD.shape[-1]), table, rows, scores)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attach(axis: str | None, alone: bool, q_MD, table, rows_MK, scores):
    return scores


def _attach_forward(axis, alone, q, table, rows, scores):
    return scores, (q, table, rows)


def _attach_backward(axis, alone, saved, d):
    q_MD, table, rows_MK = saved
    d_MK = d.reshape(rows_MK.shape).astype(jnp.float32)
    bag = functools.partial(_bag, axis, alone)
    if axis is not None and alone:
        # A device has the part of d that came through its own rows, and `shard_map` adds up what
        # the devices give for queries that they share.
        d_MK, bag = lax.psum(d_MK, axis), functools.partial(_own_bag, axis)
    # y = sum_k d[m, k] table[rows[m, k]] is the queries' gradient; and the table's is that of
    # sum_m q[m] . y[m].
    y_MD, back = jax.vjp(lambda table: bag(table, rows_MK, d_MK), table)
    return y_MD.astype(q_MD.dtype), back(q_MD.astype(y_MD.dtype))[0], None, d


_attach.defvjp(_attach_forward, _attach_backward)
