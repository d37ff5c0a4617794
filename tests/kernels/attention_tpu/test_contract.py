"""What the backend refuses, that it loads lazily, and that it runs inside shard_map."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from memtrain_kernels.attention import AttentionSpec, tpu
from memtrain_kernels.attention.tpu.block_sizes import Blocks, blocks_for, chip


NOTHING_GIVEN = (None, None, None, None)


@pytest.mark.parametrize(
    ("shape", "spec", "words"),
    [
        ({"dtype": "float16"}, AttentionSpec(), "dtype float16: it takes bfloat16, float32"),
        ({"D": 96}, AttentionSpec(), "head_dim 96: it takes 64, 128, 256"),
        ({"E": 32}, AttentionSpec(), "value_dim 32: it takes 64, 128, 192, 256"),
        ({}, AttentionSpec(block_q=64), "block_q 64: it takes multiples of 128"),
        ({}, AttentionSpec(block_kv=200), "block_kv 200: it takes multiples of 128"),
    ],
)
def test_refusals_name_the_wrong_and_the_right(shape, spec, words):
    inputs, _ = problems.arrays(**shape)
    with pytest.raises(ValueError, match=words):
        q, k, v = inputs
        tpu.attend(q, k, v, *NOTHING_GIVEN, spec)


def test_importing_the_package_imports_no_pallas():
    code = (
        "import sys, memtrain_kernels.attention.tpu\n"
        "loaded = [m for m in sys.modules if 'pallas' in m or m.startswith('flax')]\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("kind", "name"), [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e")]
)
def test_the_chip_is_that_of_the_mesh(kind, name):
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        assert chip() == name
    assert chip() == "default"


def test_block_sizes():
    spec = AttentionSpec()
    forward, backward = blocks_for(spec, 128, 2**20, 2**20, "v5p")
    assert forward == Blocks(1024, 1024)
    assert backward == Blocks(512, 1024)
    # Short sequences and short windows take short blocks, in whole lanes; the spec's own win.
    assert blocks_for(spec, 128, 1, 300, "v5p")[0] == Blocks(128, 384)
    assert blocks_for(AttentionSpec(window=300), 128, 9999, 9999, "v5p")[0] == Blocks(512, 512)
    forced = AttentionSpec(window=300, block_q=128, block_kv=1024)
    assert blocks_for(forced, 128, 9999, 9999, "v5p") == (Blocks(128, 1024), Blocks(128, 1024))


def test_inside_shard_map_with_gathered_keys():
    """Queries over two devices against all keys: values and gradients of one device."""
    if len(jax.devices()) < 2:
        pytest.skip("needs 2 devices")
    mesh = Mesh(np.array(jax.devices()[:2]), ("context",))
    spec = AttentionSpec(block_q=128, block_kv=128)
    inputs, (d_out, d_lse) = problems.arrays(T=512, S=512, H=1)
    positions = jnp.arange(512, dtype=jnp.int32)[None]
    along = P(None, "context")

    def local(q, k, v, q_pos):
        k, v, kv_pos = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (k, v, q_pos))
        return tpu.attend(q, k, v, q_pos, kv_pos, None, None, spec, interpret=True)

    sharded = jax.shard_map(local, mesh=mesh, in_specs=along, out_specs=along, check_vma=False)

    @jax.jit
    def run(inputs):
        outputs, pull = jax.vjp(lambda q, k, v: sharded(q, k, v, positions), *inputs)
        return outputs, pull((d_out, d_lse))

    whole = problems.results(inputs, (d_out, d_lse), NOTHING_GIVEN, spec, interpret=True)
    for ours, theirs in zip(jax.tree.leaves(run(inputs)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
