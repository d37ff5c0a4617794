"""The inverse of unit lower triangular matrices, in blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax


_BLOCK = 16
"""Rows that are substituted one after the other; larger blocks are joined from two."""


@jax.custom_vjp
def unit_lower_inverse(a: Array) -> Array:
    """(I + a)^-1 for strictly lower triangular a [..., C, C], C a multiple of 16 by a power of two.

    By forward substitution in blocks of 16, which are joined two by two: as stable as solving (Du
    Croz and Higham 1992), where a product of powers of `a` is not.
    """
    return _inverse(a)


def _inverse(a: Array) -> Array:
    size = a.shape[-1]
    if size <= _BLOCK:
        return _substituted(a)
    half = size // 2
    first, second = _inverse(a[..., :half, :half]), _inverse(a[..., half:, half:])
    below = -_product(_product(second, a[..., half:, :half]), first)
    above = jnp.zeros_like(below)
    return jnp.block([[first, above], [below, second]])


def _substituted(a: Array) -> Array:
    size = a.shape[-1]
    identity = jnp.broadcast_to(jnp.eye(size, dtype=a.dtype), a.shape)

    def row(i: Array, found: Array) -> Array:
        # Rows that are not known yet meet zeros of `a`.
        below = lax.dynamic_index_in_dim(a, i, axis=-2, keepdims=False)
        known = jnp.sum(below[..., None] * found, axis=-2, keepdims=True)
        unit = lax.dynamic_slice_in_dim(identity, i, 1, axis=-2)
        return lax.dynamic_update_slice_in_dim(found, unit - known, i, axis=-2)

    # A loop: written out, it is most of what a whole layer takes to compile.
    return lax.fori_loop(1, size, row, identity)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _forward(a: Array) -> tuple[Array, Array]:
    inverse = _inverse(a)
    return inverse, inverse


def _backward(inverse: Array, d_inverse: Array) -> tuple[Array]:
    transposed = jnp.swapaxes(inverse, -1, -2)
    d_a = -_product(_product(transposed, d_inverse), transposed)
    return (jnp.tril(d_a, -1),)


unit_lower_inverse.defvjp(_forward, _backward)
