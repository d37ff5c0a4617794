"""Stochastic rounding to bfloat16."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt32


def round_stochastically(
    rows: Float[Array, "U V"],
    dtype: DTypeLike,
    seed: UInt32[Array, ""],
    ids: Int[Array, "U"],
    first_column: Int[Array, ""] | int = 0,
) -> Float[Array, "U V"]:
    """float32 rows in `dtype`, up or down with chances that keep their mean.

    To bfloat16: of the two neighbours, the nearer one the more often, in proportion. The chance is
    a hash of (seed, row id, column), so the result does not depend on which device has the row, or
    which others come with it: ids and first_column are of the whole table. float32 rows stay as
    they are. Raises ValueError for another dtype.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return rows
    if jnp.dtype(dtype) != jnp.bfloat16:
        raise ValueError(f"stochastic rounding to {jnp.dtype(dtype)}: give bfloat16 or float32")
    columns = jnp.asarray(first_column, jnp.uint32) + jax.lax.iota(jnp.uint32, rows.shape[1])
    noise = _mixed(_mixed(ids.astype(jnp.uint32) ^ _mixed(seed))[:, None] ^ columns)
    bits = jax.lax.bitcast_convert_type(rows, jnp.uint32)
    # bfloat16 is the upper half: a carry out of the lower half is a step to the next number.
    raised = (bits + (noise >> 16)) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(raised, jnp.float32)
    return jnp.where(jnp.isfinite(rows), rounded, rows).astype(jnp.bfloat16)


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection of 32 bits in which each input bit flips each output bit about half the time:
    xor-shifts and odd multipliers, constants of C. Wellons' search ("lowbias32", public domain)."""
    x = x.astype(jnp.uint32)
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
