"""Exact top-k of wide rows through groups: what both lookups select with.

`lax.top_k` goes through a row whole, and on accelerators sorts it. The k best entries of a row lie
in the k groups of neighbouring columns with the greatest maxima, so a top-k over the maxima and one
over those groups' entries see about 2 sqrt(width * k) entries instead of width.

Exact with ties: of two groups with equal maxima the left one is taken. An entry outside the chosen
groups is beaten by each of their maxima, by value, or at equal value by its column, since groups
are runs of neighbouring columns: k entries go before it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


# Rows narrower than this many times top_k are as fast without groups (measured on CPU).
_WORTH_GROUPS = 128


def best_columns(scores: jax.Array, top_k: int) -> jax.Array:
    """The columns of the `top_k` greatest entries along the last axis: int32 [..., k], best first.

    scores: float [..., W], W >= top_k. Ties go to the lower column; a -0 may come after a 0.
    """
    scores = lax.stop_gradient(scores)
    if group_length(scores.shape[-1], top_k) == 1:
        return lax.top_k(scores, top_k)[1]  # as they are: a pass over whole rows costs a fifth more
    values, columns = candidates(scores, top_k)
    _, at = lax.top_k(values, top_k)
    return jnp.take_along_axis(columns, at, axis=-1, mode="promise_in_bounds")


def candidates(scores: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """A few entries among which the `top_k` best are: (values, int32 columns), columns ascending.

    scores: float [..., W]. All W come back where groups would not make them fewer. Columns
    beyond W, of value -inf, may be among them. A zero has no sign and a NaN is +inf: whatever is
    compared has one order.
    """
    *rows, width = scores.shape
    group = group_length(width, top_k)
    if group == 1:
        return comparable(scores), jnp.broadcast_to(_iota(width), scores.shape)
    missing = -width % group
    if missing:
        scores = jnp.pad(scores, [(0, 0)] * len(rows) + [(0, missing)], constant_values=-jnp.inf)
    grouped = scores.reshape(*rows, -1, group)
    _, chosen = lax.top_k(comparable(jnp.max(grouped, axis=-1)), top_k)
    # In the order of the columns again, so that a stable top-k of the entries settles their ties.
    chosen = jnp.sort(chosen, axis=-1)[..., None]
    values = jnp.take_along_axis(grouped, chosen, axis=-2, mode="promise_in_bounds")
    columns = chosen * group + _iota(group)
    return comparable(values).reshape(*rows, -1), columns.reshape(*rows, -1)


def group_length(width: int, top_k: int) -> int:
    """The power of two that makes both top-k's about equally wide; 1 where groups do not pay."""
    if width < _WORTH_GROUPS * top_k:
        return 1
    group = 4
    while (2 * group) ** 2 * top_k <= width:
        group *= 2
    return group


def comparable(scores: jax.Array) -> jax.Array:
    """Scores as they are compared: -0 as 0, NaN as +inf."""
    scores = jnp.where(scores == 0, 0, scores)
    return jnp.where(jnp.isnan(scores), jnp.inf, scores)


def _iota(length: int) -> jax.Array:
    return lax.iota(jnp.int32, length)
