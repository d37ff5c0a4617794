"""Reading a shared table of learned rows, so that its gradient may be dense or of rows alone.

A table that is differentiated gets a gradient of its own size. Where `ctx.taps` names the table, it
is held constant instead, and what an optimizer needs for the rows that were read comes apart: which
they were (`TableRead`, in `Aux.table_reads`), and the gradient of the read, which is that of a tap:
an array of zeros that is added to it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memtrain.memory.protocol import Context, TableRead
from memtrain_kernels import partitioned_weighted_gather


def read_table(
    ctx: Context, name: str, slots: Int[Array, "B T K"], weights: Float[Array, "B T K"]
) -> tuple[Float[Array, "B T V"], dict[str, TableRead]]:
    """y[b, t] = sum_k weights[b, t, k] * table[slots[b, t, k]], and what goes into
    `Aux.table_reads`.

    T is the call's tokens, or a multiple of them where a token makes several reads that are kept
    apart. Slots are rows of `ctx.tables[name]`; a negative one is no row. y has the table's dtype.
    Raises KeyError where there is no such table.
    """
    if name not in ctx.tables:
        raise KeyError(f"ctx.tables has no table {name!r}: it has {list(ctx.tables)}")
    table = ctx.tables[name]
    if name not in (taps := ctx.taps or {}):
        return partitioned_weighted_gather(table, slots, weights), {}
    y = partitioned_weighted_gather(
        jax.lax.stop_gradient(table), slots, weights, table_gradient=False
    )
    if (tap := taps[name]) is not None:
        y = _tapped(y, tap)
    return y, {name: TableRead(slots.astype(jnp.int32), jax.lax.stop_gradient(weights))}


@jax.custom_vjp
def _tapped(y: Array, tap: Array) -> Array:
    """y. Backward, the tap has y's gradient too."""
    return y


_tapped.defvjp(lambda y, tap: (y, None), lambda _, dy: (dy, dy))
