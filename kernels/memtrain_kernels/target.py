"""The device that a program is made for: the one that is here, unless said otherwise."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax


class Target(NamedTuple):
    platform: str  # "cpu", "gpu", "tpu"
    device_kind: str  # as jax.Device.device_kind says it
    is_here: bool  # false where programs are compiled for a device that this machine lacks


_target: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


def current_target() -> Target:
    """What `compiling_for` says, or the default device of this process."""
    given = _target.get()
    if given is not None:
        return given
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    device = chosen if isinstance(chosen, jax.Device) else jax.local_devices()[0]
    platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    return Target(platform, device.device_kind, is_here=True)


@contextlib.contextmanager
def compiling_for(platform: str, device_kind: str) -> Iterator[None]:
    """Inside, backends are chosen for a device that is not here: ahead-of-time compilation.

    No self-check can run there: what is unverified on that device is taken only if it is forced.
    """
    token = _target.set(Target(platform, device_kind, is_here=False))
    try:
        yield
    finally:
        _target.reset(token)
