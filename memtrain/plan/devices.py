"""The devices that a run can be planned for, by their data sheets. Imports no JAX."""

from __future__ import annotations

import os
from dataclasses import dataclass


GiB = 2**30


@dataclass(frozen=True)
class Device:
    """One kind of chip.

    memory_bytes: what a program may use. memory_bytes_per_s: of its main memory. flops_per_s: dense
    bf16. link_bytes_per_s: to one neighbour, in one direction.
    """

    kind: str
    name: str
    platform: str
    device_kind: str
    """As `jax.Device.device_kind` says it."""
    memory_bytes: float
    memory_bytes_per_s: float
    flops_per_s: float
    link_bytes_per_s: float
    float32_fraction: float
    """Rate of matrix products with float32 operands, as a share of bf16's."""
    topology_dims: int = 0
    """Numbers in the name of a slice; 0 where devices are just counted."""


# TPU: cloud.google.com/tpu/docs/{v5e,v5p,v6e}: HBM 16, 95 and 32 GB; 819, 2765 and 1640 GB/s; 197,
# 459 and 918 bf16 TFLOP/s; interconnect 1600, 4800 and 3584 Gbit/s a chip, both directions of 4, 6
# and 4 links. The memory that a program may use is what the compiler's refusals state. JAX's
# default precision multiplies float32 operands in one bf16 pass.
# GPU: NVIDIA H100 and H200 SXM data sheets: 80 and 141 GB, 3.35 and 4.8 TB/s, 989 bf16 TFLOP/s, of
# TF32 half; NVLink 900 GB/s both directions. CUDA's context takes about half a GiB.
_ACCELERATORS = (
    Device("v5e", "TPU v5e", "tpu", "TPU v5 lite", 15.75 * GiB, 819e9, 197e12, 45e9, 1.0, 2),
    Device("v5p", "TPU v5p", "tpu", "TPU v5", 95.74 * GiB, 2765e9, 459e12, 90e9, 1.0, 3),
    Device("v6e", "TPU v6e", "tpu", "TPU v6 lite", 31.25 * GiB, 1640e9, 918e12, 90e9, 1.0, 2),
    Device("h100", "H100", "gpu", "NVIDIA H100 80GB HBM3", 79.1 * GiB, 3.35e12, 989e12, 450e9, 0.5),
    Device("h200", "H200", "gpu", "NVIDIA H200", 139.8 * GiB, 4.8e12, 989e12, 450e9, 0.5),
)

DEVICES: dict[str, Device] = {device.kind: device for device in _ACCELERATORS}


def simulated_cpu(count: int) -> Device:
    """One of `count` devices that share this machine's processor and memory.

    The rates are a rough guess for a core (AVX2 at 3 GHz: 50 GFLOP/s; 10 GB/s), shared by as many
    devices as there are more than cores.
    """
    cores = os.cpu_count() or 1
    share = min(1.0, cores / count)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(
        "cpu", "CPU", "cpu", "cpu", memory / count, 10e9 * share, 50e9 * share, 5e9 * share, 1.0
    )
