"""Tokens to experts and back, by a sort: which row of a grouped product is whose.

Every token has exactly `top_k` rows, so that each way is a gather, forward and backward, and
nothing is added up in an order that is left to chance.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Assignment:
    """Rows sorted by expert, ties in the order of tokens."""

    order: Array
    """int32 [N k]: the assignment that stands in each row; token = order // k."""
    row: Array
    """int32 [N k]: the row of each assignment, the inverse of `order`."""
    sizes: Array
    """int32 [E]: rows of each expert. Rows after their sum are of none."""

    def dispatch(self, tokens: Array) -> Array:
        """Tokens [N, D] -> rows [N k, D]."""
        return _dispatch(tokens, self.order, self.row)

    def combine(self, rows: Array, weights: Array) -> Array:
        """Rows [N k, D], weights [N, k] -> of each token the weighted sum of its rows, [N, D], in
        the dtype of the weights."""
        count, top_k = weights.shape
        own = _permute(rows, self.row, self.order).reshape(count, top_k, -1)
        return jnp.einsum("nkd,nk->nd", own.astype(weights.dtype), weights)


def assign(experts: Array, num_experts: int, first: Array | int = 0) -> Assignment:
    """The assignment of tokens to the experts [N, k] that they chose.

    Experts `first` to `first + num_experts - 1` are 0 to `num_experts - 1` here; an assignment to
    any other (-1, say) has its row after all of theirs.
    """
    flat = experts.reshape(-1) - first
    group = jnp.where((flat >= 0) & (flat < num_experts), flat, num_experts).astype(jnp.int32)
    order = jnp.argsort(group, stable=True).astype(jnp.int32)
    index = jnp.arange(len(order), dtype=jnp.int32)
    row = jnp.zeros_like(order).at[order].set(index, unique_indices=True)
    sizes = jnp.sum(group[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return Assignment(order, row, sizes)


@jax.custom_vjp
def _permute(x: Array, index: Array, inverse: Array) -> Array:
    return x[index]


def _permute_forward(x, index, inverse):
    return x[index], (index, inverse)


def _permute_backward(saved, d):
    index, inverse = saved
    return d[inverse], _none(index), _none(inverse)


_permute.defvjp(_permute_forward, _permute_backward)


@jax.custom_vjp
def _dispatch(tokens: Array, order: Array, row: Array) -> Array:
    return tokens[order // (len(order) // len(tokens))]


def _dispatch_forward(tokens, order, row):
    return _dispatch(tokens, order, row), (order, row, jnp.zeros((len(tokens), 0)))


def _dispatch_backward(saved, d):
    order, row, like = saved
    count = len(like)
    own = d[row].reshape(count, len(order) // count, -1)
    # Wide: a token's rows are few, but each is a whole expert's gradient.
    total = jnp.sum(own.astype(jnp.promote_types(d.dtype, jnp.float32)), axis=1)
    return total.astype(d.dtype), _none(order), _none(row)


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


def _none(index: Array) -> np.ndarray:
    return np.zeros(index.shape, jax.dtypes.float0)
