"""The TPU backend of decoding: a Pallas Mosaic kernel that fetches pages by itself.

Importing this package imports no Pallas; the first call does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from memtrain_kernels.announce import say_once
from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.decode.capabilities import Capabilities, Problem
from memtrain_kernels.decode.paging import Pages


if TYPE_CHECKING:
    from jax.experimental.pallas import tpu as pltpu


_LANES = 128

CAPABILITIES = Capabilities(
    name="tpu",
    platform="tpu",
    dtypes=("bfloat16", "float32"),
    page_dtypes=("bfloat16", "float32", "int8", "float8_e4m3fn"),
    dims=(64, 128, 256),
    max_queries=16,
    max_rows=2048,
    row_tile=8,
    page_multiple=8,
    max_page_bytes=4 * 2**20,
    max_table_bytes=512 * 2**10,
    page_scales=False,
    mask_fn=False,
)
"""No chip has run it yet. float8 is unpacked by the vector unit of v5e, v5p and v6e, which takes
longer than reading it: there int8 is the faster one."""


def attend(
    q_BTHD: jax.Array,
    pages: Pages,
    spec: AttentionSpec,
    num_splits: int | None,
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, E] and lse [B, T, H], both float32. Raises ValueError for what it cannot serve.

    num_splits: None is one for each core of a device. interpret: run the kernel on any device, for
    tests.
    """
    from memtrain_kernels.decode.tpu import operation

    if (refusal := CAPABILITIES.refusal(Problem.of(q_BTHD, pages, spec))) is not None:
        raise ValueError(f"decode backend 'tpu' cannot serve this call: {refusal}")
    dims = {q_BTHD.shape[3], pages.v_PSKE.shape[3]}
    if min(dims) < _LANES:
        say_once(
            f"decode backend tpu: pages of dim {min(dims)} are laid out anew, the whole pool at "
            "every call, unless they have the layout of memtrain_kernels.decode.tpu.page_layout"
        )
    return operation.attend(
        q_BTHD, pages, spec, num_splits or operation.cores(), interpret=interpret
    )


def page_layout(num_kv_heads: int, dtype: DTypeLike) -> tuple[int, int, int, int]:
    """The layout in which the kernel reads pages as they lie: `major_to_minor` of a
    `jax.experimental.layout.Layout` for [P, page_size, Hkv, D].

    It is the one that arrays have by default if D is 128 or 256. Of smaller D, the default avoids
    padding to 128 lanes, and the kernel needs a copy: give the pool this layout when it is made.
    """
    swapped = heads_lie_first(num_kv_heads, jnp.dtype(dtype).itemsize)
    return (0, 2, 1, 3) if swapped else (0, 1, 2, 3)


def heads_lie_first(K: int, itemsize: int) -> bool:
    """Whether XLA keeps pages as [P, K, S, D] in memory, so that bringing heads forward is free.

    It tiles the last two dims of [P, S, K, D] where K fills tiles of 32-bit words, and else lets
    tokens stand in for heads, as they need no padding.
    """
    return not (K % 8 == 0 or (K in (1, 2, 4) and K * itemsize >= 4))
