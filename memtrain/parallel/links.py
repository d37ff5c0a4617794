"""What the links of a machine are known to do, by its kind of device. Imports no JAX."""

from __future__ import annotations


_SYNCHRONOUS = {"TPU v5 lite": 32}
"""From so many chips on, the compiler lets every permute wait for the arithmetic beside it
(`tools/aot ring`, docs/long-context.md)."""


def permutes_wait(device_kind: str, devices: int) -> bool:
    """Whether a ring over so many devices stands still while keys and values travel.

    device_kind: as `jax.Device.device_kind` says it.
    """
    return devices >= _SYNCHRONOUS.get(device_kind, devices + 1)
