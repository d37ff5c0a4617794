"""NVIDIA's cuDNN through jax.nn.dot_product_attention, for the plain cases that it serves."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from memtrain_kernels.attention.capabilities import Capabilities, Problem
from memtrain_kernels.attention.spec import AttentionSpec


CAPABILITIES = Capabilities(
    name="cudnn",
    platform="gpu",
    device_kinds=(
        "A100",
        "A10",
        "A30",
        "A40",
        "L4",
        "L40",
        "H100",
        "H200",
        "GH200",
        "B100",
        "B200",
    ),
    dtypes=("bfloat16", "float16"),
    head_dims=(64, 128),
    equal_dims=True,
    windows=False,
    right_windows=False,
    prefix=False,
    soft_cap=False,
    sink_tokens=False,
    mask_fn=False,
    positions=False,
    segments=False,
    lse=False,
    square=True,
    block_multiple=None,
)


def tile_of(problem: Problem) -> tuple[int, int]:
    """It does not tell its tiles: the whole."""
    return problem.T, problem.S


def attend(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKE: jax.Array,
    q_pos: None,
    kv_pos: None,
    q_seg: None,
    kv_seg: None,
    spec: AttentionSpec,
) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, E] in the inputs' dtype; the log-sum-exp is not told: NaN [B, T, H]."""
    o_BTHE = jax.nn.dot_product_attention(
        q_BTHD,
        k_BSKD,
        v_BSKE,
        scale=spec.scale_for(q_BTHD.shape[-1]),
        is_causal=spec.causal,
        implementation="cudnn",
    )
    return o_BTHE, jnp.full(q_BTHD.shape[:3], jnp.nan, jnp.float32)
