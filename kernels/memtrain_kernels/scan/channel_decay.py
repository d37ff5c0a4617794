"""Decays of every key channel: products over channels that no exponent can spoil.

What is left at token i of what token j wrote is exp of a sum over the tokens between, another for
every channel, so products of keys cannot be taken first and scaled after. As a product of two
factors, exp(sum to i) and exp(-sum to j), the second grows without bound. So chunks are cut into
blocks of 8 tokens (secondary chunking: Yang et al. 2023, arXiv 2312.06635). Between blocks all
factors are at most 1; within one, sums are counted from the middle of what a document has of them
in the block, so that both factors are within e^60 of 1, and near 1 where little decays. (Products
of pairs in the wrong order may be infinite; none is used.)
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


_BLOCK = 8
_product = functools.partial(jnp.einsum, precision="highest")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChannelDecays:
    """Of chunks [n, b, g]. Blocks are m w, tokens of a block i j, channels d.

    entered: left at each token of what entered the chunk, [n, b, g, C, d]; left: at the chunk's end
    of what each token wrote. to, rest: to a token from its block's beginning, and from a token to
    its block's end, [n, b, g, m, i, d]; over: of the blocks between w and m, [n, b, g, m, w, d].
    rising, falling: a token's two factors within its block. same: pairs of one document, the
    second no later, [n, b, C, C].
    """

    entered: Array
    left: Array
    to: Array
    rest: Array
    over: Array
    rising: Array
    falling: Array
    same: Array

    def pairs(self, later: Array, earlier: Array) -> Array:
        """later_i . (what is left * earlier_j), [n, b, g, 1, i, j]. later: [n, b, g, 1, C, d];
        earlier: [n, b, g, C, d]."""
        later, earlier = later.reshape(self.to.shape), earlier.reshape(self.to.shape)
        behind = (self.rest * earlier)[:, :, :, None] * self.over[..., None, :]
        across = _product("nbgmid,nbgmwjd->nbgmiwj", self.to * later, behind)
        within = _product("nbgmid,nbgmjd->nbgmij", self.rising * later, self.falling * earlier)
        diagonal = jnp.eye(across.shape[3], dtype=bool)[:, None, :, None]
        found = jnp.where(diagonal, within[:, :, :, :, :, None], across)
        found = found.reshape(*found.shape[:3], 1, *self.same.shape[-2:])
        return jnp.where(self.same[:, :, None, None], found, 0)

    def entering(self, x: Array) -> Array:
        """x times what is left of what entered. [n, b, g, 1, C, d]."""
        return x * self.entered[:, :, :, None]

    def reading(self, query: Array) -> tuple[Array, Array | None]:
        """The queries, scaled channel by channel as what they read of the entering state."""
        return query * self.entered, None

    def writing(self, key: Array) -> tuple[Array, Array | None]:
        """The keys, scaled channel by channel as what is written under them."""
        return key * self.left, None

    @property
    def kept(self) -> Array:
        """Of the entering state at the end, [n, b, g, 1, d]."""
        return self.entered[:, :, :, None, -1]


def channel_decays(log_decay: Array, same: Array, goes_on: Array, stays: Array) -> ChannelDecays:
    """log_decay: [n, b, g, C, d], C a multiple of 8. same: [n, b, C, C]; goes_on, stays: tokens of
    the document that enters the chunk, or leaves it, [n, b, C]."""
    n, b, h, C, d = log_decay.shape
    m = C // _BLOCK
    g = log_decay.reshape(n, b, h, m, _BLOCK, d)
    lower = np.tril(np.ones((_BLOCK, _BLOCK)))
    upto = _product("ij,nbgmjd->nbgmid", jnp.asarray(lower, g.dtype), g)
    rest = _product("ij,nbgmjd->nbgmid", jnp.asarray(1 - lower, g.dtype), g)
    whole = upto[..., -1, :]
    before, after, between = (
        _product("...w,nbgwd->nbg...d", jnp.asarray(mask, g.dtype), whole)
        for mask in _block_masks(m)
    )
    entered = jnp.exp(upto + before[..., None, :]).reshape(log_decay.shape)
    left = jnp.exp(rest + after[..., None, :]).reshape(log_decay.shape)
    # Sums restart where a document begins, so that nothing of another is felt.
    pairs = same.reshape(n, b, 1, m, _BLOCK, m, _BLOCK)
    own = jnp.diagonal(pairs, axis1=3, axis2=5)  # [n, b, 1, i, j, m]
    own = jnp.moveaxis(own, -1, 3).astype(g.dtype)

    def of_document(pairs: Array) -> Array:
        every_head = jnp.broadcast_to(pairs, (n, b, h, *pairs.shape[3:]))
        return _product("nbgmij,nbgmjd->nbgmid", every_head, g)

    segment = of_document(own)
    middle = 0.5 * of_document(jnp.maximum(own, jnp.swapaxes(own, -1, -2)))
    return ChannelDecays(
        entered=jnp.where(goes_on[:, :, None, :, None], entered, 0),
        left=jnp.where(stays[:, :, None, :, None], left, 0),
        to=jnp.exp(upto),
        rest=jnp.exp(rest),
        over=jnp.exp(between),
        rising=jnp.exp(segment - middle),
        falling=jnp.exp(middle - segment),
        same=same,
    )


def _block_masks(m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which blocks lie before each [m, w], after each [m, w], and between two [m, w, l]."""
    at = np.arange(m)
    before = at[None] < at[:, None]
    between = before[:, None, :] & (at > at[:, None])[None]
    return before, before.T, between
