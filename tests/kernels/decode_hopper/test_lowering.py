"""The kernel itself: it lowers to Mosaic GPU for an H200 that is described, not there.

What the compiler makes of it (registers, shared memory) tools/ahead_of_time/hopper_decode.py asks.
"""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from memtrain_kernels import AttentionSpec
from memtrain_kernels.decode import hopper
from memtrain_kernels.decode.capabilities import Problem
from memtrain_kernels.decode.paging import Pages


RICH = AttentionSpec(window=100, sink_tokens=2, prefix=3, soft_cap=20.0)


def on_an_h200():
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def abstract(
    T: int = 1,
    head_dim: int = 128,
    value_dim: int | None = None,
    page_size: int = 64,
    dtype: str = "bfloat16",
    pages: str | None = None,
    per_page: bool = False,
) -> tuple[jax.ShapeDtypeStruct, Pages]:
    B, H, K, P = 2, 16, 2, 30
    q = jax.ShapeDtypeStruct((B, T, H, head_dim), dtype)
    pages = pages or dtype
    shapes = ((P, page_size, K, head_dim), (P, page_size, K, value_dim or head_dim))
    k, v = (jax.ShapeDtypeStruct(shape, pages) for shape in shapes)
    scales = None
    if jnp.dtype(pages).itemsize == 1:
        scales = jax.ShapeDtypeStruct((P, K) if per_page else (K,), jnp.float32)
    tables = jax.ShapeDtypeStruct((B, 20), jnp.int32)
    lengths = jax.ShapeDtypeStruct((B,), jnp.int32)
    arrays: Any = (k, v, tables, lengths, scales, scales)
    return q, Pages(*arrays)


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (AttentionSpec(), {}),
        (RICH, {"dtype": "float16", "T": 9, "value_dim": 64, "page_size": 256}),
        (RICH, {"pages": "int8", "per_page": True, "page_size": 16, "head_dim": 64}),
        (AttentionSpec(), {"pages": "float8_e4m3fn", "T": 3, "head_dim": 256}),
    ],
)
def test_the_kernel_lowers_for_hopper(spec: AttentionSpec, options: dict[str, Any]) -> None:
    q, pages = abstract(**options)
    attend = jax.jit(lambda q, pages: hopper.attend(q, pages, spec, None))
    with on_an_h200():
        lowered = attend.trace(q, pages).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 1
    B, T, H, _ = q.shape
    shapes = [(B, T, H, pages.v_PSKE.shape[3]), (B, T, H)]
    assert [(x.shape, x.dtype) for x in lowered.out_info] == [(s, jnp.float32) for s in shapes]


@pytest.mark.parametrize(
    ("options", "spec", "words"),
    [
        ({"head_dim": 96}, AttentionSpec(), "head_dim 96"),
        ({"value_dim": 32}, AttentionSpec(), "value_dim 32"),
        ({"dtype": "float32"}, AttentionSpec(), "float32"),
        ({"pages": "float16"}, AttentionSpec(), "pages of float16 under q of bfloat16"),
        ({"page_size": 24}, AttentionSpec(), "page_size 24"),
        ({"page_size": 96}, AttentionSpec(), "page_size 96"),
        ({"page_size": 4}, AttentionSpec(), "page_size 4"),
        ({}, AttentionSpec(mask_fn=lambda *x: x[0] == x[1]), "mask_fn"),
        ({}, AttentionSpec(block_kv=64), "block_kv 64: it chooses its own"),
    ],
)
def test_what_it_does_not_claim_it_refuses(
    options: dict[str, Any], spec: AttentionSpec, words: str
) -> None:
    q, pages = abstract(**options)
    assert words in (hopper.CAPABILITIES.refusal(Problem.of(q, pages, spec)) or "")
    with on_an_h200(), pytest.raises(ValueError, match=f"hopper.*{words}"):
        jax.eval_shape(lambda q, pages: hopper.attend(q, pages, spec, None), q, pages)


def test_the_table_without_a_gpu_imports_no_kernel() -> None:
    code = (
        "import sys; from memtrain_kernels.decode import hopper; hopper.CAPABILITIES; "
        "assert not [m for m in sys.modules if 'pallas' in m or 'flax' in m], 'imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
