"""Halos: the last tokens before each stretch of a row that is split over devices.

Convolutions and n-gram hashes look at the few tokens before their own. Within a stretch those are
neighbours; before its first token they are on another device.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from memtrain_kernels import Layout


def has_halos(layout: Layout, length: int, size: int) -> bool:
    """Whether rows of `length` lie in stretches that are as long as a halo of `size` tokens."""
    if layout.devices == 1 or layout.kind == "striped" or length % layout.multiple:
        return False
    return length // (layout.devices * layout.pieces) >= size


def halos(x: Shaped[Array, "B T *rest"], layout: Layout, size: int) -> Shaped[Array, "B P n *rest"]:
    """The `size` tokens before each of P stretches, in device order; zeros before the first.

    Only the ends of stretches travel between devices: B * P * size tokens.
    """
    stretches = layout.devices * layout.pieces
    x = x.reshape(x.shape[0], stretches, -1, *x.shape[2:])
    ends = x[:, :, x.shape[2] - size :]
    # In device order stretch s stands at place[s].
    natural = np.concatenate(
        [[run.start for run in layout.runs(rank, layout.pieces)] for rank in range(layout.devices)]
    )
    place = np.argsort(natural)
    before = np.full(stretches, -1)
    before[place[1:]] = place[:-1]
    found = jnp.take(ends, np.maximum(before, 0), axis=1)
    first = jnp.asarray(before < 0).reshape(1, -1, *[1] * (x.ndim - 2))
    return jnp.where(first, jnp.zeros((), x.dtype), found)
