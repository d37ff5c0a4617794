"""Arrays in host memory are read and written there, so that only the rows asked for travel.

An array is in host memory where its sharding says so (`memory_kind="pinned_host"`), which inside
`jax.jit` its type does. A gather of a few of its rows by the device would first copy all of it; run
by the host, the rows go to the device and nothing else. What a device and its host do is one
program, in one order (`jax.experimental.compute_on`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.compute_on import compute_on


HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def is_on_host(x: Any) -> bool:
    return isinstance(x, jax.Array) and jax.typeof(x).memory_space == HOST


def run_on_host(function: Callable[..., Any], *args: Any, stays: bool = False) -> Any:
    """function(*args), arrays or pytrees of them, computed by the host of each device.

    Arrays of the device are sent there. stays: the results stay in host memory, as what is updated
    there does; otherwise they are sent back. Inside, JAX holds arrays that the function makes anew
    to be the device's, and does not let them meet those of the host: masks, zeros and the like are
    arguments.
    """
    there = jax.tree.map(lambda x: _moved(x, HOST), args)
    found = compute_on(function, compute_type="device_host", out_memory_spaces=HOST)(*there)
    return found if stays else jax.tree.map(lambda x: _moved(x, DEVICE), found)


def rows_of(array: jax.Array, ids: jax.Array) -> jax.Array:
    """array[ids], on the device. ids: rows that there are."""
    take = lambda array, ids: array[ids]  # noqa: E731
    return run_on_host(take, array, ids) if is_on_host(array) else take(array, ids)


def with_rows(array: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
    """`array` with `rows` at `ids`, where it lives. Each id once; those beyond it are left out."""

    def put(array: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
        return array.at[ids].set(rows, mode="drop", unique_indices=True)

    if is_on_host(array):
        return run_on_host(put, array, ids, rows, stays=True)
    return put(array, ids, rows)


def _moved(x: jax.Array, space: Any) -> jax.Array:
    return x if jax.typeof(x).memory_space == space else jax.device_put(x, space)
