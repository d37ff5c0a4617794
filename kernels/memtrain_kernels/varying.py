"""Inside `jax.shard_map`: which mesh axes arrays vary over, made alike before loops and rules."""

from __future__ import annotations

import jax
from jax import lax


def vary_alike(*arrays: jax.Array | None) -> list:
    """The arrays, each varying over all mesh axes that any of them varies over; None stays None.

    Carries of loops and cotangents of custom gradients must vary as their counterparts do. The
    gradient of an array that varied over fewer axes is summed over the others.
    """
    axes = frozenset().union(*(_axes(x) for x in arrays if x is not None))
    return [x if x is None else _pcast(x, axes) for x in arrays]


def vary_as(x: jax.Array, other: jax.Array) -> jax.Array:
    """x, a constant, varying over the mesh axes that other varies over."""
    return _pcast(x, _axes(other))


def varies(x: jax.Array) -> bool:
    """Whether x is known to vary over a mesh axis; never so under shard_map(check_vma=False)."""
    return bool(_axes(x))


def _axes(x: jax.Array) -> frozenset[str]:
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def _pcast(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(axes - _axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x
