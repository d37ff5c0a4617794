"""The device that a program is made for: the one that is here, unless said otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import jax


class Target(NamedTuple):
    platform: str  # "cpu", "gpu", "tpu"
    device_kind: str  # as jax.Device.device_kind says it
    is_here: bool  # false where programs are compiled for a device that this machine lacks


_PLATFORMS = {"cuda": "gpu", "rocm": "gpu"}
# Part of the key under which jit keeps programs: another target is another program.
_target = jax.make_user_context(default_value=None)


def current_target() -> Target:
    """What `compiling_for` says, or the default device of this process."""
    given = _target.value
    if given is not None:
        return given
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    device = chosen if isinstance(chosen, jax.Device) else jax.local_devices()[0]
    name = str(device.platform)
    return Target(_PLATFORMS.get(name, name), device.device_kind, is_here=True)


@contextlib.contextmanager
def compiling_for(platform: str, device_kind: str) -> Iterator[None]:
    """Inside, backends are chosen for a device that is not here: ahead-of-time compilation.

    No self-check can run there: what is unverified on that device is taken only if it is forced.
    """
    platform = _PLATFORMS.get(platform, platform)
    if platform not in ("cpu", "gpu", "tpu"):
        raise ValueError(f"platform {platform!r}: give cpu, gpu (cuda, rocm) or tpu")
    with _target(Target(platform, device_kind, is_here=False)):
        yield
