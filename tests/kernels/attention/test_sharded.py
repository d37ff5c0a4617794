"""Under jit with arguments sharded over batch and heads: the results of one device, no gathers."""

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from memtrain_kernels import AttentionSpec, attention
from memtrain_kernels.attention import blocks


@pytest.mark.parametrize("form", ["unrolled", "looped", "decode"])
def test_sharding_changes_nothing_and_gathers_nothing(form, monkeypatch):
    devices = jax.devices()
    if len(devices) < 8:
        pytest.skip("needs 8 devices")
    if form == "looped":
        monkeypatch.setattr(blocks, "_MAX_UNROLLED", 0)
    mesh = Mesh(np.array(devices[:8]).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    rng = np.random.default_rng(0)
    S = 24
    T = 1 if form == "decode" else S
    segments, positions = oracle.packed(rng, 4, S, documents=2)
    arrays = {
        "q": rng.standard_normal((4, T, 4, 8)).astype(np.float32),
        "k": rng.standard_normal((4, S, 2, 8)).astype(np.float32),
        "v": rng.standard_normal((4, S, 2, 8)).astype(np.float32),
        "segments": segments,
        "positions": positions,
    }
    block = None if form == "decode" else 8
    spec = AttentionSpec(window=9, ordered=T == S, block_q=block, block_kv=block)

    def loss(q, k, v, segments, positions):
        out, lse = attention(
            q,
            k,
            v,
            spec=spec,
            q_segments=segments[:, S - T :],
            kv_segments=segments,
            q_positions=positions[:, S - T :],
            kv_positions=positions,
            return_lse=True,
        )
        return jnp.sum(jnp.sin(out)) + jnp.sum(lse)

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    expected = step(*arrays.values())
    heads = P(("data", "fsdp"), None, "tensor", None)
    placed = [
        jax.device_put(x, NamedSharding(mesh, heads if x.ndim == 4 else P(("data", "fsdp"))))
        for x in arrays.values()
    ]
    compiled = step.lower(*placed).compile()
    for ours, theirs in zip(
        jax.tree.leaves(compiled(*placed)), jax.tree.leaves(expected), strict=True
    ):
        oracle.close(ours, theirs, 1e-5)
    # Sums over devices are the loss, and which tiles live; keys and values stay where they are.
    program = compiled.as_text() or ""
    assert "HloModule" in program
    assert "all-gather" not in program and "all-to-all" not in program


@pytest.mark.parametrize("form", ["unrolled", "looped", "direct"])
def test_in_shard_map_that_checks_what_varies(form, monkeypatch):
    """jax's default, check_vma=True: q is each device's own, keys and values are everybody's."""
    T, S = (1, 24) if form == "direct" else (24, 24)
    if form == "looped":
        monkeypatch.setattr(blocks, "_MAX_UNROLLED", 0)
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    q, k, v = draw(4, T, 2, 8), draw(1, S, 2, 8), draw(1, S, 2, 8)
    positions = jnp.asarray(rng.permutation(S)[None], jnp.int32)
    spec = AttentionSpec(window=9, sink_tokens=2, block_q=8, block_kv=8)

    def loss(q, k, v):
        out, lse = attention(
            q,
            jnp.broadcast_to(k, (q.shape[0], *k.shape[1:])),
            jnp.broadcast_to(v, (q.shape[0], *v.shape[1:])),
            spec=spec,
            q_positions=jnp.full((T,), S, jnp.int32) if T == 1 else positions,
            kv_positions=positions,
            return_lse=True,
            backend="xla",
        )
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0))

    def parts(q, k, v):
        value, gradients = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
        return jax.lax.psum(value, "x"), gradients

    run = jax.shard_map(
        parts, mesh=mesh, in_specs=(P("x"), P(), P()), out_specs=(P(), (P("x"), P(), P()))
    )
    ours = jax.jit(run)(q, k, v)
    theirs = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
