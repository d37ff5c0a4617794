"""Every row's own matrix, gathered: what a grouped product means."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def group_of_rows(sizes: Array, count: int) -> Array:
    """The group of each of `count` rows, [N]; the number of groups where a row is of none."""
    ends = jnp.cumsum(sizes)
    return jnp.sum(jnp.arange(count)[:, None] >= ends, axis=1)


def product(rows: Array, weights: Array, sizes: Array, dtype) -> Array:
    """[N, F] in `dtype`, from rows [N, D] and weights [G, D, F]."""
    group = group_of_rows(sizes, len(rows))
    own = jnp.take(weights, group, axis=0, mode="fill", fill_value=0)
    return jnp.einsum("nd,ndf->nf", rows, own, preferred_element_type=dtype)


def outer(rows: Array, d_out: Array, sizes: Array, dtype) -> Array:
    """[G, D, F] in `dtype`: of each group, the sum over its rows of row x d_out."""
    member = jax.nn.one_hot(group_of_rows(sizes, len(rows)), len(sizes), dtype=rows.dtype)
    return jnp.einsum("ng,nd,nf->gdf", member, rows, d_out, preferred_element_type=dtype)
