"""Pages of 8 bits: a number is its stored value times the scale of its key head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


# The greatest value that is stored; int8 leaves -128 out, so that negation stays exact.
QUANTIZED = {"int8": 127.0, "float8_e4m3fn": 448.0}


def is_quantized(dtype: DTypeLike) -> bool:
    return jnp.dtype(dtype).name in QUANTIZED


def quantize_pages(
    pages: jax.Array, dtype: DTypeLike, *, per_page: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Pages in 8 bits and their scales: pages ~ stored * scales.

    pages [P, page_size, Hkv, D], floating; dtype int8 or float8_e4m3fn. Returns (stored, the same
    shape; scales, float32), the scales [Hkv], one a key head, or with per_page [P, Hkv]: one for
    each page and head, so that pages can be quantized as they fill up. Symmetric: a scale maps the
    greatest magnitude to 127 or 448, and is 1 where all is zero; int8 rounds to nearest even.
    Raises ValueError for another dtype or shape.
    """
    name = jnp.dtype(dtype).name
    if name not in QUANTIZED:
        raise ValueError(f"dtype is {name}: give {' or '.join(QUANTIZED)}")
    if pages.ndim != 4:
        raise ValueError(f"pages has shape {pages.shape}: give [pages, page_size, kv_heads, dim]")
    if not jnp.issubdtype(pages.dtype, jnp.floating) or is_quantized(pages.dtype):
        raise ValueError(f"pages has dtype {pages.dtype}: give float32, bfloat16 or float16")
    x = pages.astype(jnp.float32)
    greatest = jnp.max(jnp.abs(x), axis=(1, 3) if per_page else (0, 1, 3))
    scales = jnp.where(greatest > 0, greatest / QUANTIZED[name], 1)
    x = x / (scales[:, None, :, None] if per_page else scales[None, None, :, None])
    # A quotient may round to just above the greatest value, which float8 would make a NaN.
    x = jnp.clip(x, -QUANTIZED[name], QUANTIZED[name])
    return (jnp.round(x) if name == "int8" else x).astype(dtype), scales
