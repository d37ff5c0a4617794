"""Cross-entropy in chunks: the logits of the whole sequence never exist at once."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from memtrain.parallel.sharding import names_of, split_here


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


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy_sum(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array | np.ndarray, "B T"],
    weights: Float[Array | np.ndarray, "B T"],
    chunk_tokens: int = 2048,
    matmul: str = "float32",
    vocab_axis: str | None = None,
) -> Float[Array, ""]:
    """Sum over tokens of weight times cross-entropy in nats.

    Differentiable in `hidden` and `unembedding`. The loss is a scalar, so its gradients are
    computed in the forward pass, chunk by chunk, and only scaled in the backward: no logits are
    made twice.

    vocab_axis: inside `jax.shard_map(check_vma=False)`, the mesh axis over which the rows of
    `unembedding` are split (Shoeybi et al. 2019, arXiv 1909.08053).
    """
    return _forward(hidden, unembedding, targets, weights, chunk_tokens, matmul, vocab_axis)[0]


def _forward(hidden, unembedding, targets, weights, chunk_tokens, matmul, vocab_axis):
    batch, length, _ = hidden.shape
    chunk = _chunk_length(batch, length, chunk_tokens)
    xs = _chunks((hidden, targets, weights), chunk)
    rows = unembedding.shape[0]
    first = 0 if vocab_axis is None else rows * jax.lax.axis_index(vocab_axis)

    def step(carry, xs):
        loss, d_unembedding = carry
        h, target, weight = xs
        logits = _logits(h, unembedding, matmul)
        hit = jax.nn.one_hot(target - first, rows, dtype=jnp.bool_)
        picked = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        if vocab_axis is None:
            lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        else:
            top = jax.lax.pmax(jnp.max(logits, axis=-1, keepdims=True), vocab_axis)
            total = jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True)
            lse = top + jnp.log(jax.lax.psum(total, vocab_axis))
            picked = jax.lax.psum(picked, vocab_axis)
        nll = lse[..., 0] - picked
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


def _backward(chunk_tokens, matmul, vocab_axis, saved, d_loss):
    d_hidden, d_unembedding = saved
    if vocab_axis is not None:
        # Each device has the loss of all rows of the vocabulary and the gradient of its own: what
        # the copies of the loss are worth together is what one of it is worth.
        d_loss = jax.lax.psum(d_loss, vocab_axis)
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


def cross_entropy_over_devices(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array | np.ndarray, "B T"],
    weights: Float[Array | np.ndarray, "B T"],
    chunk_tokens: int = 2048,
    matmul: str = "float32",
) -> Float[Array, ""]:
    """`cross_entropy_sum`, each device over its own tokens and its own part of the vocabulary.

    Left to automatic sharding, the loop over chunks would add the head's gradient up over the
    devices at every chunk. chunk_tokens: on each device.
    """
    part = split_here()
    if part is None:
        return cross_entropy_sum(hidden, unembedding, targets, weights, chunk_tokens, matmul)
    mesh, tokens, head = part.mesh, part.tokens(hidden.shape), part.vocabulary(unembedding.shape)
    vocab_axis = head[0]
    split = tuple(name for entry in tokens[:2] for name in names_of(entry))

    def local(hidden, unembedding, targets, weights):
        loss = cross_entropy_sum(
            hidden, unembedding, targets, weights, chunk_tokens, matmul, vocab_axis
        )
        return loss[None]

    losses = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(tokens, head, PartitionSpec(*tokens[:2]), PartitionSpec(*tokens[:2])),
        out_specs=PartitionSpec(split or None),
        check_vma=False,
    )(hidden, unembedding, targets, weights)
    return jnp.sum(losses)


def token_losses_over_devices(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array | np.ndarray, "B T"],
    chunk_tokens: int = 2048,
    matmul: str = "float32",
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`token_losses`, each device over its own tokens."""
    part = split_here()
    if part is None:
        return token_losses(hidden, unembedding, targets, chunk_tokens, matmul)
    tokens = part.tokens(hidden.shape)
    rows = PartitionSpec(*tokens[:2])
    return jax.shard_map(
        lambda h, u, t: token_losses(h, u, t, chunk_tokens, matmul),
        mesh=part.mesh,
        in_specs=(tokens, PartitionSpec(None, None), rows),
        out_specs=(rows, rows),
        check_vma=False,
    )(hidden, unembedding, targets)
