"""One call of `context_attention` over devices beside the oracle, forward and backward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from attention_oracle import close, dense, packed
from jax.sharding import Mesh, PartitionSpec

from memtrain_kernels import AttentionSpec
from memtrain_kernels.context import Layout, context_attention


B, T, H, K, D, E = 2, 48, 8, 4, 8, 6


def odd_pairs(q_pos, kv_pos, q_seg, kv_seg):
    """A mask of no particular meaning."""
    return (q_pos * 7 + kv_pos * 3) % 5 != 0


SPECS = {
    "causal": AttentionSpec(ordered=True),
    "window": AttentionSpec(window=7, ordered=True),
    "sinks": AttentionSpec(window=5, sink_tokens=2, ordered=True),
    "prefix": AttentionSpec(prefix=6),
    "both ways": AttentionSpec(causal=False, window=(5, 3), soft_cap=3.0),
    "everything": AttentionSpec(causal=False),
    "mask_fn": AttentionSpec(mask_fn=odd_pairs, window=30, scale=0.7),
}


def mesh_of(devices: int, axis: str = "context") -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), (axis,))


def check(
    spec: AttentionSpec,
    devices: int,
    *,
    documents: int = 3,
    extras: bool = False,
    default_positions: bool = False,
    length: int = T,
    heads: tuple[int, int] = (H, K),
    seed: int = 0,
    tolerance: float = 2e-5,
    check_vma: bool = False,
    **options,
) -> None:
    """Values, log-sum-exp and every gradient of one sharded call equal the oracle's.

    extras: with a prior and sink logits. documents: packed into each row, padding behind them; with
    default_positions there is one document without padding.
    """
    rng = np.random.default_rng(seed)
    num_heads, num_kv_heads = heads
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    q, k = draw(B, length, num_heads, D), draw(B, length, num_kv_heads, D)
    v = draw(B, length, num_kv_heads, E)
    d_o, d_lse = draw(B, length, num_heads, E), draw(B, length, num_heads)
    segments, positions = packed(rng, B, length, documents, padding=3)
    if default_positions:
        segments = np.zeros((B, length), np.int32)
        positions = np.tile(np.arange(length, dtype=np.int32), (B, 1))
    prior = (draw(B, length, num_heads, E), draw(B, length, num_heads)) if extras else None
    sinks = draw(num_heads) if extras else None
    want, want_grads = dense(
        q,
        k,
        v,
        spec,
        (positions, positions),
        (segments, segments),
        sink_logits=sinks,
        prior=prior,
        cotangents=(d_o, np.where(np.isfinite(d_lse), d_lse, 0)),
    )
    layout = Layout(options.get("layout", "contiguous"), devices)
    rows = PartitionSpec(None, "context")

    def attend(q, k, v, sinks, prior, positions, segments):
        tokens = (
            {}
            if default_positions
            else {
                "q_positions": positions,
                "kv_positions": positions,
                "q_segments": segments,
                "kv_segments": segments,
            }
        )
        return context_attention(
            q,
            k,
            v,
            axis="context",
            spec=spec,
            sink_logits=sinks,
            prior=prior,
            return_lse=True,
            **tokens,
            **options,
        )

    sharded = jax.shard_map(
        attend,
        mesh=mesh_of(devices),
        in_specs=(rows, rows, rows, PartitionSpec(), rows, rows, rows),
        out_specs=rows,
        check_vma=check_vma,
    )

    def loss(arrays, tokens, d_o, d_lse):
        o, lse = sharded(*arrays, *tokens)
        finite = jnp.where(jnp.isfinite(lse), lse, 0)
        return jnp.sum(o * d_o) + jnp.sum(finite * d_lse), (o, lse)

    arrange = lambda x: None if x is None else layout.arrange(x)  # noqa: E731
    arrays = (arrange(q), arrange(k), arrange(v), sinks, prior and tuple(map(arrange, prior)))
    tokens = (arrange(positions), arrange(segments))
    grads, (o, lse) = jax.jit(jax.grad(loss, has_aux=True))(
        arrays, tokens, arrange(d_o), arrange(d_lse)
    )
    restore = lambda x: layout.restore(np.asarray(x))  # noqa: E731
    close(restore(o), want[0], tolerance)
    close(restore(lse), want[1], tolerance)
    for name, got in zip("qkv", grads[:3], strict=True):
        close(restore(got), want_grads[name], 5 * tolerance)
    if extras:
        close(grads[3], want_grads["sink_logits"], 5 * tolerance)
        close(restore(grads[4][0]), want_grads["prior_o"], 5 * tolerance)
        close(restore(grads[4][1]), want_grads["prior_lse"], 5 * tolerance)
