"""The embedding bag that memory layers live on: a weighted sum of a few table rows per query."""

import jax
import jax.numpy as jnp
from jax import Array


@jax.custom_vjp
def weighted_gather(table: Array, slots: Array, weights: Array) -> Array:
    """y[m] = sum_k weights[m, k] * table[slots[m, k]].

    Args:
        table: [N, D]. slots: int32 [M, K] in 0..N-1. weights: [M, K].
    Returns:
        [M, D] in the table's dtype, summed in float32. The [M, K, D] rows are never formed, neither
        here nor in the gradients, which are a scatter-add for the table and dot products for the
        weights.
    """
    return _forward(table, slots, weights)[0]


def _forward(table, slots, weights):
    def add(k, y):
        return y + weights[:, k, None].astype(jnp.float32) * table[slots[:, k]]

    y = jnp.zeros((slots.shape[0], table.shape[1]), jnp.float32)
    # Unrolled: XLA fuses the gathers of a bag into one pass over the output.
    for k in range(slots.shape[1]):
        y = add(k, y)
    return y.astype(table.dtype), (table, slots, weights)


def _backward(saved, dy):
    table, slots, weights = saved
    dy = dy.astype(jnp.float32)
    d_table = jnp.zeros(table.shape, jnp.float32)
    d_weights = []
    for k in range(slots.shape[1]):
        d_weights.append(jnp.sum(dy * table[slots[:, k]], axis=-1))
        d_table = d_table.at[slots[:, k]].add(weights[:, k, None].astype(jnp.float32) * dy)
    d_weights = jnp.stack(d_weights, axis=1).astype(weights.dtype)
    return d_table.astype(table.dtype), None, d_weights


weighted_gather.defvjp(_forward, _backward)
