"""Which chips of a TPU slice are neighbours, and meshes whose ring goes from each to the next.

Imports JAX and NumPy alone: `tools/ahead_of_time` reads this file by itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils


def arranged(shape: Sequence[int], devices: Sequence[Any], ring: int) -> np.ndarray | None:
    """TPUs in the shape of a mesh: neighbours of an axis near each other, those of `ring` adjacent.

    shape: axes that move more come later. devices: of one slice, or of several equal ones, which
    then lie along the first axes that they divide. ring: the axis whose devices pass things round.
    None where the chips make no cuboid and where the slices do not divide the mesh.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    across = _over_slices(shape, slices, last=ring)
    if across is None or len(devices) != math.prod(shape):
        return None
    within = [size // times for size, times in zip(shape, across, strict=True)]
    for split in (False, True):
        try:
            if slices == 1:
                mesh = mesh_utils.create_device_mesh(
                    within, devices, allow_split_physical_axes=split
                )
            else:
                mesh = mesh_utils.create_hybrid_device_mesh(
                    within, across, devices, allow_split_physical_axes=split
                )
        except (NotImplementedError, AssertionError, ValueError):
            # How mesh_utils refuses: axes that fit no part of the torus, chips that fill no cuboid,
            # processes that do not match slices. The caller says that it keeps JAX's order.
            continue
        return _with_rings(mesh, ring, within[ring])
    return None


def _over_slices(shape: Sequence[int], slices: int, last: int) -> list[int] | None:
    """Slices along each axis, the first that they divide first; none along those after `last`."""
    across = [1] * len(shape)
    for axis, size in enumerate(shape[: last + 1]):
        across[axis] = math.gcd(size, slices)
        slices //= across[axis]
    return across if slices == 1 else None


def _with_rings(mesh: np.ndarray, ring: int, length: int) -> np.ndarray:
    """The mesh with every stretch of `length` devices along the ring in the order of a cycle.

    `mesh_utils` gives an axis a box of the torus and counts through it as through an array, so that
    the end of each line and the beginning of the next lie apart. One order serves all lines, or the
    other axes would lose their neighbours.
    """
    lines = np.moveaxis(mesh, ring, -1).reshape(-1, length)
    orders = {_cycle_through([tuple(device.coords) for device in line]) for line in lines}
    order = orders.pop()
    if orders or order is None:
        return mesh
    places = np.concatenate(
        [start + np.asarray(order) for start in range(0, mesh.shape[ring], length)]
    )
    return np.take(mesh, places, axis=ring)


def _cycle_through(coords: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Indices of the chips in such an order that each is next to the one before; the last, to the
    first. None where they fill no box, where one dimension is all there is, and in odd boxes, which
    have no such cycle."""
    marks = [sorted(set(values)) for values in zip(*coords, strict=True)]
    dims = [len(values) for values in marks]
    cycle = cycle_of_box(dims)
    if cycle is None or len(set(coords)) != math.prod(dims) or len(coords) != len(set(coords)):
        return None
    index = {
        tuple(values.index(value) for values, value in zip(marks, place, strict=True)): i
        for i, place in enumerate(coords)
    }
    return tuple(index[place] for place in cycle)


def cycle_of_box(dims: Sequence[int]) -> list[tuple[int, ...]] | None:
    """A closed walk through every cell of a box, one step at a time, that needs no wrap-around.

    Along one even dimension out and back: out over all but the first place of a path through the
    others, now forward, now backward; back over that first place. None if every dimension is odd or
    only one is longer than 1.
    """
    even = next((axis for axis, size in enumerate(dims) if size > 1 and size % 2 == 0), None)
    if even is None or sum(size > 1 for size in dims) < 2:
        return None
    path = _path_through_box([*dims[:even], *dims[even + 1 :]])
    walk = [(0, 0)]
    for row in range(dims[even]):
        columns = range(1, len(path))
        walk += [(row, column) for column in (reversed(columns) if row % 2 else columns)]
    walk += [(row, 0) for row in reversed(range(1, dims[even]))]
    return [(*path[column][:even], row, *path[column][even:]) for row, column in walk]


def _path_through_box(dims: Sequence[int]) -> list[tuple[int, ...]]:
    """Every cell once, one step at a time: each line against the direction of the one before."""
    if not dims:
        return [()]
    rest = _path_through_box(dims[1:])
    there_and_back = itertools.cycle((rest, rest[::-1]))
    return [
        (place, *more)
        for place, line in zip(range(dims[0]), there_and_back, strict=False)
        for more in line
    ]
