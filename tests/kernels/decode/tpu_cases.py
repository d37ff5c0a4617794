"""What the TPU kernel's table lets in, at its edges and between them, as shapes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from memtrain_kernels.attention import AttentionSpec


SHAPE: dict[str, Any] = {
    "B": 2,
    "T": 1,
    "H": 8,
    "K": 8,
    "D": 128,
    "E": 128,
    "S": 16,
    "M": 4,
    "dtype": "bfloat16",
    "pages": "bfloat16",
    "spec": AttentionSpec(),
    "per_page": False,
}
SERVED: dict[str, dict[str, Any]] = {
    "plain": {},
    "int8": {"pages": "int8"},
    "float8": {"pages": "float8_e4m3fn"},
    "float32": {"pages": "float32", "dtype": "float32"},
    "float32 queries": {"dtype": "float32"},
    "float32 pages": {"pages": "float32"},
    "the most queries": {"T": 16},
    "the most rows": {"T": 16, "H": 128},
    "head_dim 64, value_dim 256": {"D": 64, "E": 256},
    "head_dim 256, value_dim 64": {"D": 256, "E": 64},
    "one key head": {"K": 1},
    "an odd number of key heads": {"K": 5, "H": 10},
    "the longest table": {"M": 2**17, "S": 8, "B": 1},
    "the largest page": {"S": 1024},
    "the smallest page": {"S": 8},
    "every mask": {
        "spec": AttentionSpec(causal=False, window=(9, 3), sink_tokens=2, prefix=1, soft_cap=1.0)
    },
}


def shapes(change: dict[str, Any], P: int = 6) -> tuple[list[Any], AttentionSpec]:
    """q, both pools of P pages, tables, lengths, both scales; and the spec."""
    s = SHAPE | change
    K, spec = s["K"], s["spec"]
    scales = (P, K) if s["per_page"] else (K,)
    wanted = s["pages"] in ("int8", "float8_e4m3fn")
    arrays: list[Any] = [
        jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        for shape, dtype in (
            ((s["B"], s["T"], s["H"], s["D"]), s["dtype"]),
            ((P, s["S"], K, s["D"]), s["pages"]),
            ((P, s["S"], K, s["E"]), s["pages"]),
            ((s["B"], s["M"]), "int32"),
            ((s["B"],), "int32"),
            (scales, "float32"),
            (scales, "float32"),
        )
    ]
    return [*arrays[:5], *(arrays[5:] if wanted else (None, None))], spec
