"""The arithmetic of one tile of scores, shared by the kernels and their twins.

Logits are kept to base 2, so that exponentials are one instruction. `axis` is the tile's query
axis: 0 where rows are queries (forward, dQ), 1 where they are keys (dK/dV). Only operations that
Mosaic GPU lowers are used here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memtrain_kernels.attention.masks import visible
from memtrain_kernels.attention.spec import AttentionSpec


LOG2E = math.log2(math.e)
LN2 = math.log(2)


class Scoring(NamedTuple):
    """From products q . k to base-2 logits. scale: of the products. soft_cap: or None."""

    scale: float
    soft_cap: float | None

    @classmethod
    def of(cls, spec: AttentionSpec, head_dim: int) -> Scoring:
        return cls(spec.scale_for(head_dim), spec.soft_cap)

    @property
    def factor(self) -> float:
        """What is left to multiply in the exponent, where it joins a subtraction for free.

        Masking and maxima come before it, so it must be positive; otherwise it is 1.
        """
        return self.scale * LOG2E if self.soft_cap is None and self.scale > 0 else 1.0

    def raw(self, products: jax.Array) -> jax.Array:
        """Logits before `factor`."""
        if self.soft_cap is not None:
            return tanh(products * (self.scale / self.soft_cap)) * (self.soft_cap * LOG2E)
        return products if self.scale > 0 else products * (self.scale * LOG2E)

    def sloped(self, p: jax.Array, raw: jax.Array) -> jax.Array:
        """Probabilities times the slope of the soft cap at their raw logits, -inf where masked."""
        if self.soft_cap is None:
            return p
        # Read back from the logit: to keep the tanh would cost a tile of registers.
        t = jnp.maximum(raw * (1 / (self.soft_cap * LOG2E)), -1.0)
        return p * (1 - t * t)


class Softmax(NamedTuple):
    """A softmax under way, a row each: greatest base-2 logit and total of exponentials."""

    m: jax.Array
    total: jax.Array


def tanh(x: jax.Array) -> jax.Array:
    """Accurate to 1e-6 from one exponential; the instruction for it is good to 5e-4 only."""
    return 1 - 2 / (1 + jnp.exp2(x * (2 * LOG2E)))


def across(row: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """A vector along `axis`, repeated over the other axis of a tile."""
    return lax.broadcast_in_dim(row, shape, (axis,))


def masked(
    spec: AttentionSpec,
    raw: jax.Array,
    q_pos: jax.Array,
    q_seg: jax.Array,
    kv_pos: jax.Array,
    kv_seg: jax.Array,
    axis: int,
) -> jax.Array:
    """raw logits, -inf where the query does not see the key; tokens as vectors."""
    q_pos, q_seg = across(q_pos, raw.shape, axis), across(q_seg, raw.shape, axis)
    kv_pos, kv_seg = across(kv_pos, raw.shape, 1 - axis), across(kv_seg, raw.shape, 1 - axis)
    return jnp.where(visible(spec, q_pos, kv_pos, q_seg, kv_seg), raw, -jnp.inf)


def absorb(softmax: Softmax, raw: jax.Array, factor: float) -> tuple[Softmax, jax.Array, jax.Array]:
    """Take in one more tile: the softmax, the tile's exponentials, and how much old sums fade."""
    m = jnp.maximum(softmax.m, jnp.max(raw, axis=1) * factor)
    # -inf - -inf is no number: a row that has seen nothing yet is shifted by 0.
    shift = jnp.where(m == -jnp.inf, 0.0, m)
    fade = jnp.exp2(softmax.m - shift)
    p = jnp.exp2(raw * factor - across(shift, raw.shape, 0))
    return Softmax(m, softmax.total * fade + jnp.sum(p, axis=1)), p, fade


def finish(softmax: Softmax) -> tuple[jax.Array, jax.Array]:
    """What to multiply the sum of values by, and the natural log-sum-exp; 1 and -inf for a row
    that saw nothing."""
    # The greatest logit adds exp2(0) = 1, so a total < 1 says that nothing was seen; m is -inf.
    total = jnp.maximum(softmax.total, 1.0)
    return 1 / total, (softmax.m + jnp.log2(total)) * LN2


def probabilities(raw: jax.Array, factor: float, lse2: jax.Array, axis: int) -> jax.Array:
    """exp(logit - lse) from raw logits (-inf where masked) and base-2 lse (+inf: row sees none)."""
    return jnp.exp2(raw * factor - across(lse2, raw.shape, axis))


def logit_gradient(sloped_p: jax.Array, dp: jax.Array, delta: jax.Array, axis: int) -> jax.Array:
    """Gradient of the scaled products: p * slope * (dp - delta)."""
    return sloped_p * (dp - across(delta, dp.shape, axis))
