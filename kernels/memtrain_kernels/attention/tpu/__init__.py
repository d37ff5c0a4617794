"""The TPU backend: Pallas Mosaic kernels for the forward pass, dQ, and dK with dV.

Importing this package imports no Pallas; the first call does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

from memtrain_kernels.attention.capabilities import Capabilities, Problem
from memtrain_kernels.attention.spec import AttentionSpec


if TYPE_CHECKING:
    from jax.experimental.pallas import tpu as pltpu


CAPABILITIES = Capabilities(
    name="tpu",
    platform="tpu",
    device_kinds=("TPU v5", "TPU v5e", "TPU v5p", "TPU v6", "TPU v6e"),
    dtypes=("bfloat16", "float32"),
    head_dims=(64, 128, 256),
    value_dims=(64, 128, 192, 256),
    block_multiple=128,
)


def tile_of(problem: Problem) -> tuple[int, int]:
    """Tokens of queries and keys in a tile of the forward kernel."""
    from memtrain_kernels.attention.tpu.block_sizes import blocks_for, chip

    p = problem
    forward, _ = blocks_for(p.spec, p.head_dim, p.T, p.S, chip())
    return forward.q, forward.kv


def attend(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKE: jax.Array,
    q_pos: jax.Array | None,
    kv_pos: jax.Array | None,
    q_seg: jax.Array | None,
    kv_seg: jax.Array | None,
    spec: AttentionSpec,
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, E] and lse [B, T, H], both float32; as reference.attend.

    bfloat16 or float32; D of 64, 128, 256; E of 64, 128, 192, 256; any lengths (padded inside).
    spec.block_q and spec.block_kv must be multiples of 128. Differentiable once in q, k and v,
    with cotangents of both results. interpret: run the kernels on any device, for tests.
    Raises ValueError for what it does not serve.

    FlashAttention-2 (arXiv 2307.08691).
    """
    from memtrain_kernels.attention.tpu import operation

    problem = Problem.of(q_BTHD, k_BSKD, v_BSKE, spec)
    if (refusal := CAPABILITIES.refusal(problem)) is not None:
        raise ValueError(f"attention backend 'tpu' cannot serve this call: {refusal}")
    return operation.attend(
        q_BTHD, k_BSKD, v_BSKE, q_pos, kv_pos, q_seg, kv_seg, spec, interpret=interpret
    )


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
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What these keys add to dq, dk and dv, in float32; as xla.gradients."""
    from memtrain_kernels.attention.tpu import operation

    tokens = (q_pos, kv_pos, q_seg, kv_seg)
    rows = (do_BTHE, lse_BTH, delta_BTH)
    return operation.gradients(q_BTHD, k_BSKD, v_BSKE, *tokens, spec, *rows, interpret=interpret)
