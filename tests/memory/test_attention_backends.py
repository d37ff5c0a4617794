"""The memory trains, prefills and decodes through the TPU kernels as through any other backend."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compiled
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from memtrain.description import BuildContext
from memtrain.memory import Context
from memtrain.memory.attention import AttentionConfig
from memtrain_kernels import compiling_for, last_backend


LENGTH, CUT = 160, 130


@pytest.mark.full
@pytest.mark.parametrize("window", [None, 40])
def test_the_tpu_kernels_serve_the_memory(window):
    config = AttentionConfig(
        num_heads=2, num_kv_heads=1, head_dim=64, window=window, sink_tokens=2 if window else 0
    )
    x = jax.random.normal(jax.random.key(1), (2, LENGTH, 16))
    ctx = Context.of_documents(2, LENGTH)
    ctx = dataclasses.replace(ctx, starts=ctx.starts.at[0, 70].set(True))
    positions = jnp.arange(LENGTH) - jnp.where(jnp.arange(LENGTH) >= 70, 70, 0)
    ctx = dataclasses.replace(ctx, positions=ctx.positions.at[0].set(positions))

    def run(backend: str):
        memory = dataclasses.replace(config, backend=backend).build(
            BuildContext(dim=16), rngs=nnx.Rngs(0)
        )
        graph, parameters = nnx.split(memory)

        def loss(parameters, x):
            y, _, _ = nnx.merge(graph, parameters)(x, None, ctx)
            return jnp.sum(jnp.sin(y)), y

        whole_and_gradients = compiled(jax.value_and_grad(loss, (0, 1), has_aux=True))
        (_, whole), gradients = whole_and_gradients(parameters, x)
        assert last_backend() == backend
        step = compiled(lambda memory, x, state, ctx: memory(x, state, ctx)[:2])
        state = memory.init_state(2, LENGTH)
        first, state = step(memory, x[:, :CUT], state, ctx.window(0, CUT))
        token, _ = step(memory, x[:, CUT : CUT + 1], state, ctx.window(CUT, CUT + 1))
        assert last_backend() == backend
        return whole, jax.tree.leaves(gradients), first, token

    with jax.default_matmul_precision("highest"):
        theirs = run("reference")
        with compiling_for("tpu", "TPU v5p"), pltpu.force_tpu_interpret_mode():
            ours = run("tpu")
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        scale = max(1.0, float(np.abs(b).max()))
        np.testing.assert_allclose(a, b, atol=1e-4 * scale, rtol=0)
    whole, _, first, token = ours
    np.testing.assert_allclose(jnp.concatenate([first, token], 1), whole[:, : CUT + 1], atol=1e-5)
