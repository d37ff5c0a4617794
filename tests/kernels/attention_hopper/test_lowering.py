"""The kernels themselves: they lower to Mosaic GPU for an H200 that is described, not there.

What the compiler makes of them (registers, shared memory) is asked by `tools/aot hopper`.
"""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from memtrain_kernels import AttentionSpec
from memtrain_kernels.attention import hopper
from memtrain_kernels.attention.capabilities import Problem


RICH = AttentionSpec(causal=False, window=(100, 50), sink_tokens=2, prefix=3, soft_cap=20.0)


def on_an_h200():
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


@pytest.mark.parametrize(
    ("head_dim", "spec", "dtype"),
    [(64, AttentionSpec(), "bfloat16"), (128, RICH, "float16"), (256, RICH, "bfloat16")],
)
def test_kernels_lower_for_hopper(head_dim: int, spec: AttentionSpec, dtype: str) -> None:
    q = jax.ShapeDtypeStruct((2, 300, 4, head_dim), dtype)
    k = jax.ShapeDtypeStruct((2, 300, 2, head_dim), dtype)
    segments = jax.ShapeDtypeStruct((2, 300), jnp.int32)

    def gradients(q, k, v, segments):
        def loss(q, k, v):
            o, lse = hopper.attend(q, k, v, None, None, segments, segments, spec)
            return jnp.sum(o * o) + jnp.sum(lse)

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    with on_an_h200():
        lowered = jax.jit(gradients).trace(q, k, k, segments).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("custom_call @mosaic_gpu") == 3
    assert [x.shape for x in lowered.out_info] == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_dim": 96, "value_dim": 96}, "head_dim 96"),
        ({"value_dim": 128}, "value_dim 128"),
        ({"dtype": "float32"}, "float32"),
        ({"spec": AttentionSpec(block_q=64)}, "block_q 64"),
        ({"spec": AttentionSpec(mask_fn=lambda *x: x[0] == x[1])}, "mask_fn"),
    ],
)
def test_what_it_does_not_claim_it_refuses(change: dict, words: str) -> None:
    fields = {"head_dim": 64, "value_dim": 64, "dtype": "bfloat16", "spec": AttentionSpec()}
    fields |= change
    problem = Problem(B=1, T=128, S=128, H=2, K=1, **fields)
    assert words in (hopper.CAPABILITIES.refusal(problem) or "")
    q = jax.ShapeDtypeStruct((1, 128, 2, problem.head_dim), problem.dtype)
    k = jax.ShapeDtypeStruct((1, 128, 1, problem.head_dim), problem.dtype)
    v = jax.ShapeDtypeStruct((1, 128, 1, problem.value_dim), problem.dtype)
    attend = lambda q, k, v: hopper.attend(q, k, v, None, None, None, None, problem.spec)  # noqa: E731
    with on_an_h200(), pytest.raises(ValueError, match=words.split()[0]):
        jax.eval_shape(attend, q, k, v)


def test_the_table_without_a_gpu_imports_no_kernel() -> None:
    code = (
        "import sys; from memtrain_kernels.attention import hopper; hopper.CAPABILITIES; "
        "assert not [m for m in sys.modules if 'pallas' in m or 'flax' in m]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
