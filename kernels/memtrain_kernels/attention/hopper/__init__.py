"""The `hopper` backend: attention kernels for NVIDIA H100 and H200 (sm_90a), bf16 and fp16.

Written in Pallas Mosaic GPU: TMA, wgmma, one warpgroup that loads and two that compute. Compiled by
the real compiler ahead of time and, as algorithms, proved on CPU by their twins; not verified on a
chip until `CAPABILITIES.verified_on` names one.
"""

from __future__ import annotations

import jax

from memtrain_kernels.attention.capabilities import Capabilities, Problem
from memtrain_kernels.attention.hopper.attend import attend_by, gradients_by
from memtrain_kernels.attention.spec import AttentionSpec


CAPABILITIES = Capabilities(
    "hopper",
    platform="gpu",
    device_kinds=("H100", "H200"),
    dtypes=("bfloat16", "float16"),
    head_dims=(64, 128, 256),
    value_dims=(64, 128, 256),
    equal_dims=True,
    mask_fn=False,
    block_multiple=None,
)


def tile_of(problem: Problem) -> tuple[int, int]:
    """Tokens of queries and keys in a tile of the forward kernel."""
    from memtrain_kernels.attention.hopper.plan import FORWARD

    blocks = FORWARD[problem.head_dim]
    return blocks.block_q, blocks.block_kv


def attend(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKE: jax.Array,
    q_pos: jax.Array | None,
    kv_pos: jax.Array | None,
    q_seg: jax.Array | None,
    kv_seg: jax.Array | None,
    spec: AttentionSpec,
) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, E] and lse [B, T, H] in float32; as reference.attend.

    o was rounded to q's dtype by the kernel. Raises ValueError for what it does not serve; block
    sizes among it: they are those that the registers allow.
    """
    refusal = CAPABILITIES.refusal(Problem.of(q_BTHD, k_BSKD, v_BSKE, spec))
    if refusal is not None:
        raise ValueError(f"attention backend 'hopper' cannot serve this call: {refusal}")
    return attend_by("kernels", q_BTHD, k_BSKD, v_BSKE, q_pos, kv_pos, q_seg, kv_seg, spec)


def gradients(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKE: jax.Array,
    q_pos: jax.Array | None,
    kv_pos: jax.Array | None,
    q_seg: jax.Array | None,
    kv_seg: jax.Array | None,
    spec: AttentionSpec,
    do_BTHE: jax.Array,
    lse_BTH: jax.Array,
    delta_BTH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What these keys add to dq, dk and dv, in float32 after the kernels' rounding."""
    tokens = (q_pos, kv_pos, q_seg, kv_seg)
    rows = (do_BTHE, lse_BTH, delta_BTH)
    return gradients_by("kernels", q_BTHD, k_BSKD, v_BSKE, *tokens, spec, *rows)
