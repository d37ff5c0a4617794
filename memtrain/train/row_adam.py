"""Adam for memory tables: a row that got no gradient stands still, and so do its moments.

Lazy Adam. A step reads few of a large table's rows; dense Adam would go on moving all the others by
their old momentum, and read and write the whole table and its moments for it. Here each row has an
Adam of its own (Kingma and Ba 2015), whose steps are those at which the row's gradient was not
zero: moments decay and are bias-corrected by the row's own count. Where every row gets a gradient
at every step, it is Adam.

The gradient is a table (`update_table`), or the rows that were read (`update_rows`): the same
result, the second without a pass over the table.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from memtrain.train.rounding import round_stochastically
from memtrain_kernels import NO_ROW, RowGradients, rows_of, with_rows


Rounding = Literal["nearest", "stochastic", "master"]


class TableMoments(NamedTuple):
    """What the optimizer keeps of a table [N, V].

    mean, square: first and second moments, float32 [N, V]. updates: how often each row was updated,
    int32 [N]. last_step: the step of its last update, -1 for none. master: the rows in float32, of
    which the table is the rounded copy; None where the table has all there is. writable: the rows
    that are given gradients; None for all.
    """

    mean: Float[Array, "N V"]
    square: Float[Array, "N V"]
    updates: Int[Array, "N"]
    last_step: Int[Array, "N"]
    master: Float[Array, "N V"] | None = None
    writable: Bool[Array, "N"] | None = None


@dataclasses.dataclass(frozen=True)
class Shard:
    """Which part of a table a device has: where it begins, and inside `jax.shard_map` the mesh axes
    whose devices have the other columns of its rows."""

    first_row: Array | int = 0
    first_column: Array | int = 0
    over_columns: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class RowAdam:
    """The constants. rounding: how float32 results become a bfloat16 table's numbers: to the
    nearest; up or down by chance, so that small updates are not lost on average; or to the nearest,
    of a float32 copy that is kept beside."""

    beta1: float
    beta2: float
    epsilon: float
    rounding: Rounding = "nearest"
    chosen_rows: bool = False
    """Whether moments say which rows are `writable`: none, until they are chosen."""
    block_numbers: int = 1 << 23
    """Of a table, updated at a time: 32 MiB in float32, and as much of either moment."""

    def block_rows(self, width: int) -> int:
        """Rows of so many numbers that are updated at a time."""
        return max(1, self.block_numbers // width)

    def init(self, table: Float[Array, "N V"]) -> TableMoments:
        rows = table.shape[0]
        return TableMoments(
            mean=jnp.zeros(table.shape, jnp.float32),
            square=jnp.zeros(table.shape, jnp.float32),
            updates=jnp.zeros((rows,), jnp.int32),
            last_step=jnp.full((rows,), -1, jnp.int32),
            master=table.astype(jnp.float32) if self.rounding == "master" else None,
            writable=jnp.zeros((rows,), jnp.bool_) if self.chosen_rows else None,
        )

    def update_table(
        self,
        table: Float[Array, "N V"],
        moments: TableMoments,
        gradient: Float[Array, "N V"],
        now: Now,
    ) -> tuple[Float[Array, "N V"], TableMoments]:
        """Of the whole table, however it is sharded."""
        ids = jax.lax.iota(jnp.int32, table.shape[0])
        moved = jnp.any(gradient != 0, axis=-1) & now.good
        new = self._step(table, moments, gradient.astype(jnp.float32), now, ids)
        old = (table, moments)
        keep = lambda n, o: jnp.where(moved.reshape(-1, *[1] * (o.ndim - 1)), n, o)  # noqa: E731
        return jax.tree.map(keep, new, old)

    def update_rows(
        self,
        table: Float[Array, "N V"],
        moments: TableMoments,
        gradients: RowGradients,
        now: Now,
        shard: Shard = Shard(),
    ) -> tuple[Float[Array, "N V"], TableMoments]:
        """gradients: ids are rows of `table`, which is this shard of the whole.

        Block after block of `block_numbers`, and none beyond the rows that were read: what is
        held beside table, moments and gradients are the rows of one block.
        """
        N, ids = table.shape[0], gradients.ids
        moved = (ids != NO_ROW) & jnp.any(gradients.rows != 0, axis=-1) & now.good
        if shard.over_columns:
            # A row moves as a whole: what is zero in these columns may not be so in the others.
            moved = jax.lax.pmax(moved.astype(jnp.int32), shard.over_columns) > 0
        # Whatever does not move gets a target of its own outside: all are then unique.
        target = jnp.where(moved, ids, N + jax.lax.iota(jnp.int32, ids.size))
        block = min(ids.size, self.block_rows(table.shape[1]))

        def of_block(i: Array | int, old: tuple[Array, TableMoments]) -> tuple[Array, TableMoments]:
            # The last block ends with the rows and begins among those that are done: not again.
            start = jnp.minimum(i * block, ids.size - block)
            taken = lambda a: jax.lax.dynamic_slice_in_dim(a, start, block)  # noqa: E731
            at = start + jax.lax.iota(jnp.int32, block)
            here = jnp.minimum(taken(ids), N - 1)
            rows, own = jax.tree.map(lambda a: rows_of(a, here), old)
            first = shard.first_row + here
            new = self._step(rows, own, taken(gradients.rows), now, first, shard.first_column)
            put_at = jnp.where(at < i * block, N + at, taken(target))
            return jax.tree.map(lambda a, rows: with_rows(a, put_at, rows), old, new)

        if block == ids.size:
            return of_block(0, (table, moments))
        blocks = -(-jnp.sum(ids != NO_ROW) // block)
        return jax.lax.fori_loop(0, blocks, of_block, (table, moments))

    def _step(
        self,
        table: Array,
        moments: TableMoments,
        gradient: Array,
        now: Now,
        ids: Array,
        first_column: Array | int = 0,
    ) -> tuple[Array, TableMoments]:
        """One step of every row given."""
        updates = moments.updates + 1
        count = updates.astype(jnp.float32)[:, None]
        mean = self.beta1 * moments.mean + (1 - self.beta1) * gradient
        square = self.beta2 * moments.square + (1 - self.beta2) * gradient**2
        direction = (mean / (1 - self.beta1**count)) / (
            jnp.sqrt(square / (1 - self.beta2**count)) + self.epsilon
        )
        before = table.astype(jnp.float32) if moments.master is None else moments.master
        rows = before - now.learning_rate * direction
        if self.rounding == "stochastic":
            written = round_stochastically(rows, table.dtype, now.seed, ids, first_column)
        else:
            written = rows.astype(table.dtype)
        return written, TableMoments(
            mean,
            square,
            updates,
            jnp.full_like(moments.last_step, 0) + now.step,
            None if moments.master is None else rows,
            moments.writable,
        )


class Now(NamedTuple):
    """Of this step: the rate, its number, a seed for rounding, whether it counts at all."""

    learning_rate: Float[Array, ""]
    step: Int[Array, ""]
    seed: UInt32[Array, ""]
    good: Bool[Array, ""]
