"""The embedding bag that memory layers live on: a weighted sum of a few table rows per query."""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
from jax import Array, lax

from memtrain_kernels.host import is_on_host, run_on_host
from memtrain_kernels.lookup.bag_gradient import (
    accumulation_dtype,
    sum_by_row,
    weights_gradient,
)
from memtrain_kernels.lookup.checks import Arrays, check_bag
from memtrain_kernels.varying import vary_alike, vary_as


# Columns of slots in one program step.
_WRITTEN_OUT = 32


def weighted_gather(
    table: Arrays, slots: Arrays, weights: Arrays, *, table_gradient: bool = True
) -> Array:
    """y[m] = sum_k weights[m, k] * table[slots[m, k]].

    Args:
        table: [N, D]. slots: integers [M, K] in 0..N-1; a negative one is no row and adds nothing
        (what a top-k lookup gives where too few keys were seen). weights: [M, K].
        table_gradient: False leaves the table's gradient out, which is then zero: for tables whose
        gradient is taken as the rows that were touched, by `weighted_gather_row_gradients`.
    Returns:
        [M, D] in the table's dtype, summed in float32. The [M, K, D] rows are never formed, neither
        here nor in the gradients: row sums for the table (deterministic on every device, no
        atomics), dot products for the weights.
    Raises ValueError for shapes and dtypes that do not fit.
    """
    check_bag(slots, weights, table=table)
    slots = jnp.asarray(slots, jnp.int32)
    table, slots, weights = vary_alike(jnp.asarray(table), slots, jnp.asarray(weights))
    return _weighted_gather(table_gradient, table, slots, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_gather(table_gradient: bool, table: Array, slots: Array, weights: Array) -> Array:
    return bag(table, slots, weights).astype(table.dtype)


def bag(table_ND: Array, slots_MK: Array, weights_MK: Array) -> Array:
    """y [M, D] in float32, on the device; summed by the host where the table lives there."""
    dtype = accumulation_dtype(table_ND)
    weights_MK = jnp.where(slots_MK < 0, 0, weights_MK.astype(dtype))
    slots_MK = jnp.maximum(slots_MK, 0)
    if is_on_host(table_ND):
        return run_on_host(_written_out, table_ND, slots_MK, weights_MK)
    (M, K), D = slots_MK.shape, table_ND.shape[1]

    def add(y_MD: Array, columns: tuple[Array, Array]) -> tuple[Array, None]:
        # Written out: XLA fuses the gathers into one pass over the output.
        for slots_M, weights_M in zip(*columns, strict=True):
            y_MD = y_MD + weights_M[:, None] * table_ND[slots_M].astype(dtype)
        return y_MD, None

    y_MD = vary_as(jnp.zeros((M, D), dtype), weights_MK)
    whole = K // _WRITTEN_OUT * _WRITTEN_OUT
    if whole:
        slots, weights = (x.T[:whole].reshape(-1, _WRITTEN_OUT, M) for x in (slots_MK, weights_MK))
        y_MD, _ = lax.scan(add, y_MD, (slots, weights))
    return add(y_MD, (slots_MK.T[whole:], weights_MK.T[whole:]))[0]


def _written_out(table_ND: Array, slots_MK: Array, weights_MK: Array) -> Array:
    """The bag as a host takes it: no loop, whose first sum would be an array of the device."""
    columns = [
        weights_MK[:, k, None] * table_ND[slots_MK[:, k]].astype(weights_MK.dtype)
        for k in range(slots_MK.shape[1])
    ]
    return functools.reduce(operator.add, columns)


def _forward(table_gradient, table, slots, weights):
    return _weighted_gather(table_gradient, table, slots, weights), (table, slots, weights)


def _backward(table_gradient, saved, dy):
    table, slots, weights = saved
    d_weights = weights_gradient(table, slots, dy).astype(weights.dtype)
    if not table_gradient:
        return None, None, d_weights
    d_table = sum_by_row(slots, weights, dy, table.shape[0])
    return d_table.astype(table.dtype), None, d_weights


_weighted_gather.defvjp(_forward, _backward)
