"""The dense backend: every row's pages gathered side by side. Differentiable to any order."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from memtrain_kernels.attention import reference as dense
from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.decode.capabilities import Capabilities
from memtrain_kernels.decode.paging import Pages, query_tokens


CAPABILITIES = Capabilities("reference", verified_on=("*",))
"""Serves everything, everywhere: plain jnp, held to a float64 oracle by the tests."""


def attend(
    q_BTHD: jax.Array, pages: Pages, spec: AttentionSpec, num_splits: int | None
) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, E] and lse [B, T, H] in float32, or wider inputs' own dtype; one split always."""
    del num_splits
    B, T = q_BTHD.shape[:2]
    M, S = pages.tables_BM.shape[1], pages.page_size
    kv_pos = jnp.arange(M * S, dtype=jnp.int32)[None]
    kv_seg = jnp.where(kv_pos < pages.lengths_B[:, None], 0, -1)
    # Table entries beyond the length are no pages, and slots beyond it may hold anything, NaN too.
    held_BM = jnp.arange(M, dtype=jnp.int32) * S < pages.lengths_B[:, None]
    tables_BM = jnp.where(held_BM, pages.tables_BM, 0)
    dtype = jnp.promote_types(q_BTHD.dtype, jnp.float32)

    def row(pages_PSKD: jax.Array, scales: jax.Array | None) -> jax.Array:
        x_BMSKD = pages_PSKD[tables_BM].astype(dtype)
        if scales is not None:
            scales = scales.astype(dtype) if scales.ndim == 1 else scales.astype(dtype)[tables_BM]
            x_BMSKD = x_BMSKD * scales[..., None, :, None]
        x = x_BMSKD.reshape(B, M * S, *x_BMSKD.shape[3:])
        return jnp.where((kv_seg >= 0)[..., None, None], x, 0)

    q_pos, q_seg = query_tokens(pages.lengths_B, T)
    return dense.attend(
        q_BTHD.astype(dtype),
        row(pages.k_PSKD, pages.k_scales),
        row(pages.v_PSKE, pages.v_scales),
        q_pos,
        kv_pos,
        q_seg,
        kv_seg,
        spec,
    )
