"""Grouped products by `jax.lax.ragged_dot`, of which TPU's compiler makes a kernel of its own."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax


_ROWS_BY_ROWS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([0], [0]), ([], [])),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def product(rows: Array, weights: Array, sizes: Array, dtype) -> Array:
    """See `memtrain_kernels.grouped.reference`."""
    out = lax.ragged_dot(rows, weights, sizes, preferred_element_type=dtype)
    # Nothing is promised of rows after the last group.
    grouped = jnp.arange(len(rows)) < jnp.sum(sizes)
    return jnp.where(grouped[:, None], out, 0)


def outer(rows: Array, d_out: Array, sizes: Array, dtype) -> Array:
    """See `memtrain_kernels.grouped.reference`."""
    grouped = (jnp.arange(len(rows)) < jnp.sum(sizes))[:, None]
    rows, d_out = jnp.where(grouped, rows, 0), jnp.where(grouped, d_out, 0)
    return lax.ragged_dot_general(rows, d_out, sizes, _ROWS_BY_ROWS, preferred_element_type=dtype)
