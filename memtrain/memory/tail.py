"""Tails: the transitions of `ShortConv`'s state, the last few inputs of each row.

A run's tail has the form of the state after it, from empty: slots fill up from the right, and an
empty one belongs to document -1. So a transition is composed with another, and advances a state, in
one and the same way. Documents are numbered from the beginning of the run.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from memtrain.memory.protocol import Context, token_documents


Tail = dict[str, Array]


def run_tail(x: Float[Array, "B T D"], ctx: Context, size: int) -> Tail:
    """The last `size` valid inputs of each row of a run."""
    first = jnp.zeros((x.shape[0],), jnp.int32)
    documents, begun = token_documents(first, ctx)
    end = jnp.argmax(ctx.valid, axis=1) + jnp.sum(ctx.valid, axis=1)
    index = end[:, None] - size + jnp.arange(size)
    owners = _at(documents, jnp.maximum(index, 0))
    owners = jnp.where(index < 0, -1, owners)
    inputs = jnp.where(owners[..., None] < 0, 0, _at(x, jnp.maximum(index, 0)))
    return {"input": inputs, "document": owners, "current_document": begun}


def join_tails(first: Tail, then: Tail) -> Tail:
    """The tail after both; `first` may be a state, whose dtypes the result has."""
    size = first["document"].shape[1]
    filled = jnp.sum(then["document"] >= 0, axis=1, keepdims=True)
    slots = jnp.arange(size)
    new = slots >= size - filled
    kept = jnp.minimum(slots + filled, size - 1)
    current = first["current_document"]
    inputs = jnp.where(
        new[..., None], then["input"].astype(first["input"].dtype), _at(first["input"], kept)
    )
    documents = jnp.where(new, then["document"] + current[:, None], _at(first["document"], kept))
    return {
        "input": inputs,
        "document": documents,
        "current_document": current + then["current_document"],
    }


def _at(rows: Array, index: Array) -> Array:
    """rows[b, index[b, i]]."""
    return jax.vmap(lambda r, i: r[i])(rows, index)
