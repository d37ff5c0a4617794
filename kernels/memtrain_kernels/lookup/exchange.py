"""Rows of a table that is sharded over devices, read and added to by gathering what is asked.

Each exchange serves one chunk of C tokens a device, all devices of the axis at once:
- `read`: y [C, V] of the device's own tokens.
- `push`: adds the chunk's gradient to the device's own rows or columns, unless their total is None,
  and gives that of the weights.
Everything is added in a fixed order: devices one after another, then their tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from memtrain_kernels.lookup.bag_gradient import sorted_runs, weights_gradient
from memtrain_kernels.lookup.weighted_gather import bag


class Exchange(Protocol):
    """How the devices of a mesh axis serve each other's reads. Hashable: part of a program."""

    def read(
        self, table_NV: jax.Array, slots_CK: jax.Array, weights_CK: jax.Array
    ) -> jax.Array: ...

    def push(
        self,
        total_NV: jax.Array | None,
        table_NV: jax.Array,
        slots_CK: jax.Array,
        weights_CK: jax.Array,
        dy_CV: jax.Array,
    ) -> tuple[jax.Array | None, jax.Array]: ...


@dataclass(frozen=True)
class Columns:
    """Each device sums its own columns for the tokens of all; sums go home in the table's dtype."""

    axis: tuple[str, ...]

    def read(self, table_NV, slots_CK, weights_CK):
        slots_MK, weights_MK = everyones(slots_CK, self.axis), everyones(weights_CK, self.axis)
        y_MV = bag(table_NV, slots_MK, weights_MK).astype(table_NV.dtype)
        # Kept apart: XLA on CPU would compute y once for every device that it is sent to.
        return lax.all_to_all(lax.optimization_barrier(y_MV), self.axis, 0, 1, tiled=True)

    def push(self, total_NV, table_NV, slots_CK, weights_CK, dy_CV):
        slots_MK, weights_MK = everyones(slots_CK, self.axis), everyones(weights_CK, self.axis)
        dy_MV = lax.all_to_all(dy_CV, self.axis, 1, 0, tiled=True)
        if total_NV is not None:
            total_NV = add_to_rows(total_NV, slots_MK, weights_MK, dy_MV)
        return total_NV, sums_home(weights_gradient(table_NV, slots_MK, dy_MV), self.axis)


@dataclass(frozen=True)
class MaskedRows:
    """Each device sums what lies in its own rows for the tokens of all; the sums add up on the
    way home, in float32."""

    axis: tuple[str, ...]

    def read(self, table_NV, slots_CK, weights_CK):
        slots_MK = self._own(slots_CK, table_NV.shape[0])
        return sums_home(bag(table_NV, slots_MK, everyones(weights_CK, self.axis)), self.axis)

    def push(self, total_NV, table_NV, slots_CK, weights_CK, dy_CV):
        slots_MK = self._own(slots_CK, table_NV.shape[0])
        dy_MV = everyones(dy_CV, self.axis)
        if total_NV is not None:
            weights_MK = everyones(weights_CK, self.axis)
            total_NV = add_to_rows(total_NV, slots_MK, weights_MK, dy_MV)
        # One device alone has a row: every sum is of one number and zeros.
        return total_NV, sums_home(weights_gradient(table_NV, slots_MK, dy_MV), self.axis)

    def _own(self, slots_CK: jax.Array, rows: int) -> jax.Array:
        """The slots of all devices' tokens as rows of this device; -1 where they are others'."""
        local_MK = everyones(slots_CK, self.axis) - lax.axis_index(self.axis) * rows
        return jnp.where((local_MK >= 0) & (local_MK < rows), local_MK, -1)


def everyones(x_C: jax.Array, axis: tuple[str, ...]) -> jax.Array:
    """The x of all devices, one after another: [C, ...] -> [n * C, ...]."""
    return lax.all_gather(x_C, axis, axis=0, tiled=True)


def sums_home(x_M: jax.Array, axis: tuple[str, ...]) -> jax.Array:
    """The sum over devices of what each has for the tokens of one: [n * C, ...] -> [C, ...]."""
    return lax.psum_scatter(x_M, axis, scatter_dimension=0, tiled=True)


def add_to_rows(
    total_NV: jax.Array, slots_MK: jax.Array, weights_MK: jax.Array, dy_MV: jax.Array
) -> jax.Array:
    """total, with weights[m, k] * dy[m] added to row slots[m, k]. A negative slot is no row.

    As `bag_gradient.sum_by_row`, which starts from zeros: on CPU in place, so that many small
    chunks cost no pass over the table each.
    """
    num_rows, dtype = total_NV.shape[0], total_NV.dtype

    def in_place(total_NV, slots_MK, weights_MK, dy_MV):
        slots_MK = jnp.where(slots_MK < 0, num_rows, slots_MK)
        dy_MV = dy_MV.astype(dtype)

        def column(total_NV, pair):
            slots_M, weights_M = pair
            shares_MV = weights_M[:, None].astype(dtype) * dy_MV
            return total_NV.at[slots_M].add(shares_MV, mode="drop"), None

        return lax.scan(column, total_NV, (slots_MK.T, weights_MK.T))[0]

    def by_runs(total_NV, slots_MK, weights_MK, dy_MV):
        return total_NV + sorted_runs(slots_MK, weights_MK, dy_MV.astype(dtype), num_rows=num_rows)

    return lax.platform_dependent(
        total_NV, slots_MK, weights_MK, dy_MV, cpu=in_place, default=by_runs
    )
