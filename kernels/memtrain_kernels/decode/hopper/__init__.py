"""The `hopper` backend of decoding: a Pallas Mosaic GPU kernel for NVIDIA H100 and H200 (sm_90a).

Importing this package imports no Pallas; the first call does. Compiled by the real compiler ahead
of time and, as an algorithm, proved on CPU by its twin; not verified on a chip until
`CAPABILITIES.verified_on` names one.
"""

from __future__ import annotations

import jax

from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.decode.capabilities import Capabilities, Problem
from memtrain_kernels.decode.hopper.operation import attend_by
from memtrain_kernels.decode.hopper.plan import TILE
from memtrain_kernels.decode.paging import Pages
from memtrain_kernels.decode.quantize import is_quantized


_MAX_ROWS = 2**16 - 1  # what one dimension of a grid of thread blocks holds


class HopperCapabilities(Capabilities):
    """The table, and what its fields cannot say: which page sizes and which pairs of dtypes."""

    def refusal(self, problem: Problem) -> str | None:
        refusal = super().refusal(problem)
        if refusal is not None:
            return refusal
        if problem.spec.block_kv is not None:
            return f"block_kv {problem.spec.block_kv}: it chooses its own"
        S = problem.page_size
        if S % TILE and TILE % S:
            return f"page_size {S}: it takes 8, 16, 32 and multiples of {TILE}"
        if not is_quantized(problem.page_dtype) and problem.page_dtype != problem.dtype:
            return f"pages of {problem.page_dtype} under q of {problem.dtype}: it takes one dtype"
        if problem.B > _MAX_ROWS:
            return f"{problem.B} rows: it takes {_MAX_ROWS} at most"
        return None


CAPABILITIES = HopperCapabilities(
    "hopper",
    platform="gpu",
    device_kinds=("H100", "H200"),
    dtypes=("bfloat16", "float16"),
    page_dtypes=("bfloat16", "float16", "int8", "float8_e4m3fn"),
    dims=(64, 128, 256),
    page_multiple=8,
    mask_fn=False,
)
"""No chip has run it yet. float16 queries over int8 pages take twice the conversions of bfloat16
ones: prefer bfloat16 there."""


def attend(
    q_BTHD: jax.Array, pages: Pages, spec: AttentionSpec, num_splits: int | None
) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, E] and lse [B, T, H], both float32. Raises ValueError for what it cannot serve.

    num_splits: None fills the device.
    """
    if (refusal := CAPABILITIES.refusal(Problem.of(q_BTHD, pages, spec))) is not None:
        raise ValueError(f"decode backend 'hopper' cannot serve this call: {refusal}")
    return attend_by("kernel", q_BTHD, pages, spec, num_splits)
