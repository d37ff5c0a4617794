"""Peak arithmetic of the devices, for MFU."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp


# Dense bf16 FLOP/s by `device_kind`, from the vendors' data sheets.
_BF16 = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_flops(num_devices: int, dtype: str) -> tuple[float | None, str]:
    """FLOP/s of `num_devices` devices together, and where the figure comes from.

    On CPU, where the simulated devices share the cores, it is measured: a large matrix product.
    None for an accelerator that is not in the table.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _measured(dtype), f"measured {dtype} matrix product on this CPU"
    for kind, flops in sorted(_BF16.items(), key=lambda item: -len(item[0])):
        if device.device_kind.startswith(kind):
            return flops * num_devices, f"{kind} data sheet, bf16"
    return None, f"no peak known for {device.device_kind!r}"


def _measured(dtype: str, size: int = 1024, repeats: int = 4) -> float:
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    product(a).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
