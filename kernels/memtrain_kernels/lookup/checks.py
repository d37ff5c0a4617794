"""Checks that the lookup functions share: each says what is wrong and what would be right."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


Arrays = jax.Array | np.ndarray


def check_count(name: str, value: object, least: int, most: int | None) -> None:
    """An int in least..most."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}: give an int")
    if value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"between {least} and {most}"
        raise ValueError(f"{name}={value} must be {bounds}")


def check_bag(
    slots: Arrays, weights: Arrays, *, table: Arrays | None = None, dy: Arrays | None = None
) -> None:
    """The arguments of a weighted gather or of its gradient."""
    check_dtype("slots", slots, jnp.integer, "an integer dtype")
    check_dtype("weights", weights, jnp.floating, "a floating dtype")
    if slots.ndim != 2 or not slots.shape[1]:
        raise ValueError(f"slots has shape {slots.shape}: give [M, K], K at least 1")
    if weights.shape != slots.shape:
        raise ValueError(f"weights has shape {weights.shape}: give that of slots, {slots.shape}")
    if table is not None:
        check_dtype("table", table, jnp.floating, "a floating dtype")
        if table.ndim != 2 or 0 in table.shape:
            raise ValueError(f"table has shape {table.shape}: give [N, D], at least one row")
    if dy is not None:
        check_dtype("dy", dy, jnp.floating, "a floating dtype")
        if dy.ndim != 2 or dy.shape[0] != slots.shape[0]:
            raise ValueError(f"dy has shape {dy.shape}: give [{slots.shape[0]}, D]")


def check_dtype(name: str, array: Arrays, kind: type, right: str) -> None:
    if not jnp.issubdtype(array.dtype, kind):
        raise ValueError(f"{name} has dtype {array.dtype}: give {right}")


def host_value(x: Arrays) -> np.ndarray | None:
    """The array's values where this process can read them now; None inside a transformation."""
    if isinstance(x, Tracer):
        return None
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return None
    return np.asarray(x)
