"""What the device can do at most, measured: a large matrix product and a large copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def ceilings(*, quick: bool) -> dict[str, float]:
    """FLOP/s of a matrix product in float32 and bfloat16 with random data, and bytes/s of a copy
    (what is read and what is written)."""
    on_cpu = jax.default_backend() == "cpu"
    size = 512 if quick else 2048 if on_cpu else 8192
    found = {}
    rng = np.random.default_rng(0)
    for dtype in ("float32", "bfloat16"):
        x = jnp.asarray(rng.standard_normal((size, size), np.float32), dtype)
        # Not the default precision, which on an accelerator rounds float32 to fewer bits.
        precision = "highest" if dtype == "float32" else None
        product = jax.jit(lambda a, b, p=precision: jnp.matmul(a, b, precision=p))
        found[dtype] = 2 * size**3 / _seconds(lambda f=product, x=x: f(x, x))
    numbers = 2**20 if quick else 2**26 if on_cpu else 2**30
    x = jnp.ones(numbers, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    found["copy"] = 8 * numbers / _seconds(lambda: copy(x))
    return found


def _seconds(call: Callable[[], jax.Array], rounds: int = 5) -> float:
    for _ in range(2):
        jax.block_until_ready(call())
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)
