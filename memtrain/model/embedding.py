"""The embedding's lookup, each device for its own tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from memtrain.parallel.sharding import split_here


def embed(
    table: Float[Array, "V D"], tokens: Int[Array | np.ndarray, "B T"]
) -> Float[Array, "B T D"]:
    """Rows of the table. On a mesh, the table is gathered along D and each device reads what its
    own tokens ask of its own part of the vocabulary: left to automatic sharding, the rows of all
    tokens are gathered everywhere before they are split."""
    split = split_here()
    if split is None:
        return table[tokens]
    head, rows = split.vocabulary(table.shape), split.tokens(tokens.shape)
    axis = head[0]

    def local(table, tokens):
        if axis is None:
            return table[tokens]
        index = tokens - table.shape[0] * jax.lax.axis_index(axis)
        mine = (index >= 0) & (index < table.shape[0])
        found = table[jnp.clip(index, 0, table.shape[0] - 1)]
        return jax.lax.psum(jnp.where(mine[..., None], found, 0), axis)

    return jax.shard_map(
        local,
        mesh=split.mesh,
        in_specs=(head, rows),
        out_specs=PartitionSpec(*rows, None),
        check_vma=False,
    )(table, tokens)
