"""Cross-entropy in chunks: the logits of the whole sequence never exist at once."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def _chunk_length(batch: int, length: int, chunk_tokens: int) -> int:
    """Positions per chunk. Chunks run along T, so that a batch sharded over devices stays where it
    is.
    """
    return min(length, max(1, chunk_tokens // batch))


def _chunks(arrays, chunk: int):
    """Arrays [B, T, ...] -> [T/chunk, B, chunk, ...], padded with zeros at the end."""
    length = arrays[0].shape[1]
    count = -(-length // chunk)

    def cut(a):
        a = jnp.pad(a, [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(a.shape[0], count, chunk, *a.shape[2:]), 1, 0)

    return tuple(cut(a) for a in arrays)


def _joined(chunks: Array, length: int) -> Array:
    joined = jnp.moveaxis(chunks, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]


def _logits(hidden, unembedding, matmul):
    """[..., D] x [V, D] -> float32 [..., V]."""
    return jnp.einsum(
        "...d,vd->...v",
        hidden.astype(matmul),
        unembedding.astype(matmul),
        preferred_element_type=jnp.float32,
    )


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy_sum(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array | np.ndarray, "B T"],
    weights: Float[Array, "B T"],
    chunk_tokens: int = 2048,
    matmul: str = "float32",
) -> Float[Array, ""]:
    """Sum over tokens of weight times cross-entropy in nats.

    Differentiable in `hidden` and `unembedding`. The loss is a scalar, so its gradients are
    computed in the forward pass, chunk by chunk, and only scaled in the backward: no logits are
    made twice.
    """
    nll, _ = token_losses(hidden, unembedding, targets, chunk_tokens, matmul)
    return jnp.sum(nll * weights)


def _forward(hidden, unembedding, targets, weights, chunk_tokens, matmul):
    batch, length, _ = hidden.shape
    chunk = _chunk_length(batch, length, chunk_tokens)
    xs = _chunks((hidden, targets, weights), chunk)

    def step(carry, xs):
        loss, d_unembedding = carry
        h, target, weight = xs
        logits = _logits(h, unembedding, matmul)
        lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        hit = jax.nn.one_hot(target, logits.shape[-1], dtype=jnp.bool_)
        nll = lse[..., 0] - jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        d_logits = ((jnp.exp(logits - lse) - hit) * weight[..., None]).astype(matmul)
        d_h = jnp.einsum(
            "btv,vd->btd",
            d_logits,
            unembedding.astype(matmul),
            preferred_element_type=jnp.float32,
        )
        d_unembedding += jnp.einsum(
            "btv,btd->vd", d_logits, h.astype(matmul), preferred_element_type=jnp.float32
        )
        return (loss + jnp.sum(nll * weight), d_unembedding), d_h.astype(hidden.dtype)

    start = (jnp.zeros((), jnp.float32), jnp.zeros(unembedding.shape, jnp.float32))
    (loss, d_unembedding), d_hidden = jax.lax.scan(step, start, xs)
    return loss, (_joined(d_hidden, length), d_unembedding.astype(unembedding.dtype))


def _backward(chunk_tokens, matmul, saved, d_loss):
    d_hidden, d_unembedding = saved
    scale = lambda g: (g * d_loss).astype(g.dtype)  # noqa: E731
    return scale(d_hidden), scale(d_unembedding), None, None


cross_entropy_sum.defvjp(_forward, _backward)


def token_losses(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array | np.ndarray, "B T"],
    chunk_tokens: int = 2048,
    matmul: str = "float32",
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Cross-entropy in nats of each token, and 1.0 where the most likely token is the target."""
    batch, length, _ = hidden.shape
    chunk = _chunk_length(batch, length, chunk_tokens)

    def one(xs):
        h, target = xs
        logits = _logits(h, unembedding, matmul)
        nll = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(
            logits, target[..., None], axis=-1
        ).squeeze(-1)
        return nll, (jnp.argmax(logits, axis=-1) == target).astype(jnp.float32)

    nll, correct = jax.lax.map(one, _chunks((hidden, targets), chunk))
    return _joined(nll, length), _joined(correct, length)
