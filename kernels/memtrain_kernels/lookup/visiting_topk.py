"""Exact top-k where queries and keys are both sharded over a mesh axis: queries visit the keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memtrain_kernels.varying import vary_alike


class Best(NamedTuple):
    """The best keys of some queries, best first. Where fewer were seen: -inf, and slot -1."""

    scores: jax.Array  # [B, T, H, k] float32
    positions: jax.Array  # int32, of the keys
    slots: jax.Array  # int32


Search = Callable[[Any], Best]
"""What a device's own keys are to some queries (a pytree of arrays)."""


def best_of(first: Best, second: Best, top_k: int) -> Best:
    """The best of two sets of keys: by score, then the lower position, then the lower slot."""
    joined = [jnp.concatenate(pair, axis=-1) for pair in zip(first, second, strict=True)]
    scores, positions, slots = joined
    # What was not seen has score -inf and comes last, so its place does not matter.
    found = lax.sort((-scores, positions, slots), num_keys=3)
    return Best(*(x[..., :top_k] for x in (-found[0], found[1], found[2])))


def visiting_topk(queries: Any, search: Search, top_k: int, axis: str) -> Best:
    """`search` of the keys of all devices of the axis, for each device's own queries.

    The queries go round the ring of devices, n permutes in all, and take with them what they have
    found: a device holds its own keys, one visiting set of queries and its picks, whatever n is.
    Not differentiable: give `lax.stop_gradient` of everything.
    """
    n = lax.axis_size(axis)
    ring = [(i, (i + 1) % n) for i in range(n)]

    def hop(visiting: tuple[Any, Best], _: None) -> tuple[tuple[Any, Best], None]:
        queries, best = visiting
        best = best_of(best, search(queries), top_k)
        return jax.tree.map(lambda x: lax.ppermute(x, axis, ring), (queries, best)), None

    shape = jax.eval_shape(search, queries)
    nothing = Best(
        jnp.full((*shape.scores.shape[:-1], top_k), -jnp.inf, shape.scores.dtype),
        *(jnp.full((*s.shape[:-1], top_k), -1, s.dtype) for s in shape[1:]),
    )
    leaves, tree = jax.tree.flatten((queries, nothing))
    own = lax.axis_index(axis)
    *leaves, _ = vary_alike(*leaves, own)
    (_, best), _ = lax.scan(hop, jax.tree.unflatten(tree, leaves), None, length=n)
    return best
