"""From logits to a token: greedy, temperature, top-k and top-p, seeded.

The order is fixed: logits are divided by the temperature, the `top_k` likeliest are kept, then of
their renormalised probabilities the shortest run, likeliest first, that reaches `top_p`. Among
equal logits the lower token id is the likelier. Temperature 0 takes the likeliest token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

from memtrain.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. Raises BadInput for values that describe no distribution."""

    temperature: float = 0.8
    """0 is greedy; 1 the model's own distribution."""
    top_k: int | None = None
    """Tokens kept, at least 1; None keeps all."""
    top_p: float | None = None
    """Probability that the kept tokens have to reach, in (0, 1]; None keeps all."""

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise BadInput(f"temperature={self.temperature} must be a finite number of at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise BadInput(f"top_k={self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise BadInput(f"top_p={self.top_p} must be above 0 and at most 1")


def kept_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits over the temperature, -inf for tokens that are never drawn. Needs temperature > 0."""
    logits = logits.astype(jnp.float32) / sampling.temperature
    top_p = None if sampling.top_p == 1 else sampling.top_p
    if sampling.top_k is None and top_p is None:
        return logits
    # A stable sort of the negated logits: equal ones stay in order of their ids.
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    keep = jnp.isfinite(ranked)
    if sampling.top_k is not None:
        keep &= jnp.arange(logits.shape[-1]) < sampling.top_k
    if top_p is not None:
        probability = jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf), axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        keep &= (before < top_p).at[..., 0].set(True)
    rank = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(keep, rank, axis=-1), logits, -jnp.inf)


def sample(
    logits: Float[Array, "B V"],
    seed: Integer[Array, ""],
    step: Integer[Array, ""],
    sampling: Sampling,
    *,
    num_tokens: int | None = None,
) -> Int[Array, "B"]:
    """One token a row. The draw depends on the logits, the seed, the step and the row alone.

    num_tokens: ids from here on are never drawn: a model's vocabulary may be larger than its
      tokenizer's.
    """
    if num_tokens is not None and num_tokens < logits.shape[-1]:
        logits = jnp.where(jnp.arange(logits.shape[-1]) < num_tokens, logits, -jnp.inf)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    key = jax.random.fold_in(jax.random.key(seed), step)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(logits.shape[0]))
    drawn = jax.vmap(jax.random.categorical)(keys, kept_logits(logits, sampling))
    return drawn.astype(jnp.int32)
