"""What a chunk of tokens does to any state that enters it, and what it answers from it.

With S the state that enters, in a chunk of C tokens (Yang et al. 2024, arXiv 2406.06484 and
2412.06464; by channel Kimi Linear, arXiv 2510.26692):

    R   = U - W S                     what each token writes, less what is erased of it
    out = reading(S) + inside R       inside: lower triangular
    S'  = kept S + writing(R)

U = (I + A)^-1 V and W = (I + A)^-1 E, where A holds what each token erases of those before it, and
E what it erases of S. All of it is made for many chunks at once.

Axes of einsum: n chunks, b rows, g key heads, r value heads of each, i j l tokens of a chunk, d key
channels, v value channels.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from memtrain_kernels.scan.arguments import Run
from memtrain_kernels.scan.channel_decay import channel_decays
from memtrain_kernels.scan.head_decay import head_decays, lower
from memtrain_kernels.scan.triangular import unit_lower_inverse


product = functools.partial(jnp.einsum, precision="highest")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunks:
    """query, key: [n, b, g, i, d]. reads, writes: by how much each token's are scaled, [n, b, g, r,
    i] or None. kept: [n, b, g, r, 1 or d]. inside: [n, b, g, r, i, j]. U: [n, b, g, r, i, v]; W:
    [n, b, g, r, i, d], or None where nothing is erased."""

    query: Array
    key: Array
    reads: Array | None
    writes: Array | None
    kept: Array
    inside: Array
    U: Array
    W: Array | None

    def written(self, S: Array) -> Array:
        """R, of one chunk (without n) or of all with the states that enter them."""
        return self.U if self.W is None else self.U - product("...id,...dv->...iv", self.W, S)

    def after(self, S: Array, R: Array) -> Array:
        """The state after the chunk."""
        R = R if self.writes is None else self.writes[..., None] * R
        return self.kept[..., None] * S + _grouped("...gid,...griv->...grdv", self.key, R)

    def outputs(self, S: Array, R: Array) -> Array:
        """[..., g, r, i, v]."""
        read = _grouped("...gid,...grdv->...griv", self.query, S)
        read = read if self.reads is None else self.reads[..., None] * read
        return read + product("...ij,...jv->...iv", self.inside, R)


def chunks_of(run: Run, size: int) -> Chunks:
    """run: of a number of tokens that `size` divides."""
    B, T, G, _ = run.query.shape
    H, N = run.value.shape[2], T // size
    R = 1 if run.by_channel else H // G
    # Chunks outermost, as they are run; tokens of a chunk next to the channels; value heads behind
    # their key head.
    cut = lambda x: jnp.moveaxis(x.reshape(B, N, size, *x.shape[2:]), 1, 0)  # noqa: E731
    heads = lambda x: jnp.moveaxis(cut(x), 2, 3)  # noqa: E731
    apart = lambda x: heads(x).reshape(N, B, H // R, R, size, *x.shape[3:])  # noqa: E731
    document = jnp.cumsum(cut(run.starts), axis=2, dtype=jnp.int32)
    same = (document[..., :, None] == document[..., None, :]) & lower(size)
    goes_on, stays = document == 0, document == document[..., -1:]
    query, key, value = heads(run.query), heads(run.key), apart(run.value)
    if run.by_channel:
        # Every value head has decays of its own, and so keys of its own.
        query, key = (jnp.repeat(x, H // G, axis=2) for x in (query, key))
        decays = channel_decays(heads(run.log_decay), same, goes_on, stays)
    else:
        decays = head_decays(apart(run.log_decay), same, goes_on, stays)
    (read, reads), (written, writes) = decays.reading(query), decays.writing(key)
    U, W = value, None
    if run.erase is not None:
        erase = apart(run.erase)
        by_head = erase.ndim == 5
        erased = (erase[..., None] if by_head else erase) * key[:, :, :, None]
        if by_head:  # products of keys are then those of all value heads
            between = erase[..., None] * decays.pairs(key[:, :, :, None], key)
        else:
            between = decays.pairs(erased, key)
        inverse = unit_lower_inverse(jnp.tril(between, -1))
        U = product("...ij,...jv->...iv", inverse, value)
        W = product("...ij,...jd->...id", inverse, decays.entering(erased))
    return Chunks(
        query=read,
        key=written,
        reads=reads,
        writes=writes,
        kept=decays.kept,
        inside=decays.pairs(query[:, :, :, None], key),
        U=U,
        W=W,
    )


def _grouped(form: str, a: Array, x: Array) -> Array:
    """The product of a key head's array with those of its value heads. One alone is not a
    dimension: as one it would be moved about."""
    if x.shape[-3] > 1:
        return product(form, a, x)
    return product(form.replace("r", ""), a, x[..., 0, :, :])[..., None, :, :]
