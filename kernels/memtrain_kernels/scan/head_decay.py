"""Decays of one number a head: products of keys are taken first, and scaled after."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


_product = functools.partial(jnp.einsum, precision="highest")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadDecays:
    """How much is left at token i of what token j wrote, at i of what entered the chunk, and at its
    end of what i wrote: between [n, b, g, r, i, j], entered and left [n, b, g, r, i]. Nothing
    across documents. (Axes as in `chunks`.)"""

    between: Array
    entered: Array
    left: Array

    def pairs(self, later: Array, earlier: Array) -> Array:
        """later_i . earlier_j times what is left, [n, b, g, r, i, j]. later: [n, b, g, r or 1, i,
        d]; earlier: [n, b, g, j, d]."""
        if later.shape[3] == 1:
            return (
                _product("nbgid,nbgjd->nbgij", later[:, :, :, 0], earlier)[:, :, :, None]
                * self.between
            )
        return _product("nbgrid,nbgjd->nbgrij", later, earlier) * self.between

    def entering(self, x: Array) -> Array:
        """x times what is left of what entered. [n, b, g, r, i, d]."""
        return x * self.entered[..., None]

    def reading(self, query: Array) -> tuple[Array, Array | None]:
        """The queries, and by how much what they read of the entering state is scaled."""
        return query, self.entered

    def writing(self, key: Array) -> tuple[Array, Array | None]:
        """The keys, and by how much what is written under them is scaled."""
        return key, self.left

    @property
    def kept(self) -> Array:
        """Of the entering state at the end, [n, b, g, r, 1]."""
        return self.entered[..., -1:]


def head_decays(log_decay: Array, same: Array, goes_on: Array, stays: Array) -> HeadDecays:
    """log_decay: [n, b, g, r, i]. same: pairs of one document, the second no later, [n, b, i, j].
    goes_on, stays: tokens of the document that enters the chunk, or leaves it, [n, b, i].

    Sums over the tokens between, not differences of sums from the beginning: those would lose the
    small ones behind a large one, and feel the documents before (Dao and Gu 2024, `segsum`).
    """
    size = log_decay.shape[-1]
    upto = jnp.asarray(lower(size), log_decay.dtype)
    after = log_decay[..., :, None] * jnp.asarray(~lower(size).T, log_decay.dtype)  # [l, j]: l > j
    between = _product("il,nbgrlj->nbgrij", upto, after)
    from_begin = _product("il,nbgrl->nbgri", upto, log_decay)
    masked = lambda mask, x: jnp.where(mask[:, :, None, None], jnp.exp(x), 0)  # noqa: E731
    return HeadDecays(
        between=masked(same, between),
        entered=masked(goes_on, from_begin),
        left=masked(stays, jnp.sum(after, axis=-2)),
    )


def lower(size: int) -> np.ndarray:
    """[i, j]: j is no later than i."""
    return np.tril(np.ones((size, size), bool))
