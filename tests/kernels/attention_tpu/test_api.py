"""The kernels behind the public function: with a prior and sink logits, and explained."""

import functools

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh

from memtrain_kernels import (
    AttentionSpec,
    attention,
    compiling_for,
    explain,
    last_backend,
    partitioned,
    resolve_backend,
)


T, H, K, D = 300, 4, 2, 64
SPEC = AttentionSpec(window=150, sink_tokens=2, block_q=128, block_kv=128)


def test_a_call_with_everything_agrees_with_the_reference():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    segments, positions = oracle.packed(rng, 1, T, documents=3, padding=7)
    arrays = {
        "q": draw(1, T, H, D),
        "k": draw(1, T, K, D),
        "v": draw(1, T, K, D),
        "sink_logits": draw(H),
        "prior": (draw(1, T, H, D), draw(1, T, H)),
    }
    d_out, d_lse = draw(1, T, H, D), draw(1, T, H)

    @functools.partial(jax.jit, static_argnums=1)
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(arrays, backend):
        arrays = dict(arrays)
        q, k, v = (arrays.pop(n) for n in "qkv")
        out, lse = attention(
            q,
            k,
            v,
            spec=SPEC,
            q_positions=positions,
            kv_positions=positions,
            q_segments=segments,
            kv_segments=segments,
            return_lse=True,
            backend=backend,
            **arrays,
        )
        return jnp.sum(out * d_out) + jnp.sum(lse * d_lse), (out, lse)

    with jax.default_matmul_precision("highest"):
        theirs = run(arrays, "reference")
        with compiling_for("tpu", "TPU v5p"), pltpu.force_tpu_interpret_mode():
            ours = run(arrays, "tpu")
    assert last_backend() == "tpu"
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        oracle.close(a, b, 1e-4)


def test_choice_and_explanation():
    q = jax.ShapeDtypeStruct((1, 8192, H, 128), jnp.bfloat16)
    with compiling_for("tpu", "TPU v5p"):
        found = explain(q, q, q, backend="tpu")
        # Nothing of it was checked on a chip, and there is none here to check it on.
        with partitioned(Mesh(np.array(jax.devices()[:1]), ("data",))):
            name, reason = resolve_backend()
        assert name == "xla" and "tpu: unverified on TPU v5p, which is not here" in reason
    assert (found.backend, found.verified) == ("tpu", False)
    assert (found.block_q, found.block_kv) == (1024, 1024)
    assert "verified  no" in str(found)
    x = jnp.ones((1, 128, 2, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="'tpu', which cannot serve this call: runs on tpu"):
        attention(x, x, x, backend="tpu")
