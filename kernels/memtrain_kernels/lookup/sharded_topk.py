"""Exact top-k over keys that are sharded over a mesh axis."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from memtrain_kernels.lookup.arguments import as_tokens, check_arrays, prepare
from memtrain_kernels.lookup.checks import Arrays, check_count
from memtrain_kernels.lookup.memory_topk import pick
from memtrain_kernels.lookup.search import MaskFn
from memtrain_kernels.varying import varies


def sharded_memory_topk(
    queries: Arrays,
    keys: Arrays,
    top_k: int,
    *,
    axis_name: str | tuple[str, ...],
    q_positions: Arrays | None = None,
    kv_positions: Arrays | None = None,
    q_segments: Arrays | None = None,
    kv_segments: Arrays | None = None,
    mask_fn: MaskFn | None = None,
    key_scales: Arrays | None = None,
    block_queries: int | None = None,
    block_keys: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`memory_topk` inside `jax.shard_map`, with the keys sharded over the mesh axis `axis_name`.

    Each device searches its own keys; the k best of each are gathered (k * devices entries a query,
    whatever the number of keys) and merged, on every device alike.
    Shapes: as `memory_topk`, keys, kv_positions, kv_segments and scales a key being this device's
    share of S, all shares equally long; queries and what belongs to them are the same on all
    devices of the axis. 1 <= top_k <= keys of all shares.
    Returns (scores, indices), the same on all devices of the axis; indices into all keys, the
    shares one after another. They are those of `memory_topk` on all keys, ties included; scores to
    the bit wherever a product's rounding does not hang on the shape of its tile (give both the same
    block_keys, dividing the shares).
    Gradients reach each key on the device that has it; those of the queries are summed over the
    axis by `shard_map`. Raises ValueError as `memory_topk` does.
    """
    check_arrays(queries, keys, key_scales)
    batch, share = (1, keys.shape[0]) if keys.ndim == 2 else (queries.shape[0], keys.shape[1])
    check_count("top_k", top_k, 1, share * lax.axis_size(axis_name))
    first = lax.axis_index(axis_name) * share
    positions = as_tokens("kv_positions", kv_positions, batch, share)
    by_index = positions is None
    if positions is None:
        positions = first + jnp.arange(share, dtype=jnp.int32)[None]
    scores, slots = pick(
        prepare(
            queries,
            keys,
            min(top_k, share),
            q_positions,
            positions,
            q_segments,
            kv_segments,
            mask_fn,
            key_scales,
            block_queries,
            block_keys,
            sorts=not by_index,
        )
    )
    positions = jnp.broadcast_to(positions, (batch, share))
    if keys.ndim == 2:
        place = positions[0][slots]
    else:
        flat = jnp.maximum(slots, 0).reshape(batch, -1)
        place = jnp.take_along_axis(positions, flat, axis=1).reshape(slots.shape)
    indices = jnp.where(slots < 0, -1, first + slots)

    # Where shard_map keeps track of what varies, it learns that the result does not; where it does
    # not, "invarying" has another transpose in jax 0.11.
    to = "invarying" if varies(first) else "varying"

    def everywhere(x: jax.Array) -> jax.Array:
        return lax.all_gather(x, axis_name, axis=x.ndim - 1, tiled=True, to=to)

    scores, place, indices = everywhere(scores), everywhere(place), everywhere(indices)
    # What was not seen has score -inf and comes last, so its place does not matter.
    entries = lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    ranking = (-lax.stop_gradient(scores), place, indices, entries)
    _, _, indices, order = lax.sort(ranking, num_keys=3)
    return _reorder(scores, order)[..., :top_k], indices[..., :top_k]


@jax.custom_vjp
def _reorder(x: jax.Array, order: jax.Array) -> jax.Array:
    """x in another order along its last axis. Its gradient is a gather too, by the inverse."""
    return jnp.take_along_axis(x, order, axis=-1, mode="promise_in_bounds")


def _reorder_forward(x, order):
    return _reorder(x, order), order


def _reorder_backward(order, d):
    return jnp.take_along_axis(d, jnp.argsort(order, axis=-1), axis=-1), None


_reorder.defvjp(_reorder_forward, _reorder_backward)
