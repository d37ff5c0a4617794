"""Which backend serves a decode call: the candidates, their tables, the choice and its reason."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from memtrain_kernels.announce import Record
from memtrain_kernels.decode.capabilities import Capabilities, Problem
from memtrain_kernels.decode.partition import Attend, over_devices
from memtrain_kernels.partition import is_told
from memtrain_kernels.target import Target, current_target


# Each is a module of this folder with CAPABILITIES and `attend`, imported at its first use.
BACKENDS = ("reference", "xla", "tpu", "hopper")
ENVIRONMENT_VARIABLE = "MEMTRAIN_DECODE_BACKEND"

# In the order in which they are tried, where they serve the call and were verified on the device.
_CANDIDATES: dict[str, tuple[str, ...]] = {"tpu": ("tpu",), "gpu": ("hopper",)}
_FALLBACK = "xla"
# XLA looks into the others, and splits them over devices by itself.
_OPAQUE = ("tpu", "hopper")

_NOT_TOLD = (
    "there are several devices and the program does not say how it is sharded "
    "(memtrain_kernels.partitioned)"
)

_record = Record("decode")


def backend_module(name: str) -> ModuleType:
    """The module of a backend. Raises ValueError for a name that is no backend."""
    return importlib.import_module(f"memtrain_kernels.decode.{_known(name, 'backend')}")


def attend_with(name: str) -> Attend:
    """The function of a backend: (q, pages, spec, num_splits) -> (o, lse)."""
    attend = backend_module(name).attend
    return over_devices(attend) if name in _OPAQUE else attend


def capabilities(name: str) -> Capabilities:
    """The table of what a backend serves. Raises ValueError for a name that is no backend."""
    return backend_module(name).CAPABILITIES


def resolve_backend(backend: str | None = None, problem: Problem | None = None) -> tuple[str, str]:
    """The backend that a call gets, and why: (name, reason).

    The argument wins over the environment variable MEMTRAIN_DECODE_BACKEND, which wins over the
    automatic choice: the platform's own kernel where it serves the problem and was verified on the
    kind of device, else "xla". Raises ValueError for a name that is no backend, and for a forced
    one that cannot serve. Without a problem, what the plainest call would get.
    """
    if backend is not None:
        return _forced(backend, "backend argument", problem)
    variable = os.environ.get(ENVIRONMENT_VARIABLE)
    if variable:
        return _forced(variable, ENVIRONMENT_VARIABLE, problem)
    target = current_target()
    passed_over = []
    for name in _CANDIDATES.get(target.platform, ()):
        refusal = why_not(name, problem, target)
        if refusal is None and name in _OPAQUE and not is_told():
            refusal = _NOT_TOLD
        if refusal is None and not is_verified(name, target.device_kind):
            refusal = f"unverified on {target.device_kind}"
        if refusal is None:
            return name, f"automatic: serves this call on {target.device_kind}"
        passed_over.append(f"{name}: {refusal}")
    if passed_over:
        return _FALLBACK, "automatic, for want of better; " + "; ".join(passed_over)
    return _FALLBACK, "automatic: block after block of pages, serves every device and every call"


def why_not(name: str, problem: Problem | None, target: Target) -> str | None:
    """Why a backend cannot serve a problem on a device; None if it can."""
    table = capabilities(name)
    if table.platform is not None and table.platform != target.platform:
        return f"runs on {table.platform}, this is {target.platform}"
    kinds = table.device_kinds
    if kinds is not None and not any(kind in target.device_kind for kind in kinds):
        return f"runs on {', '.join(kinds)}, this is {target.device_kind}"
    return None if problem is None else table.refusal(problem)


def is_verified(name: str, device_kind: str) -> bool:
    """Whether a backend's numbers were checked on this kind of device, as its table says."""
    return any(kind in ("*", device_kind) for kind in capabilities(name).verified_on)


def last_backend() -> str | None:
    """The backend of the most recent call of paged_attention, None before the first.

    A call inside jit counts when it is traced: a cached program does not count again.
    """
    return _record.last


def backend_counts() -> dict[str, int]:
    """How many calls each backend has served in this process (jit: traced)."""
    return _record.counts()


def record(name: str, reason: str) -> None:
    """Counts a call and announces its backend, once a reason."""
    _record.add(name, reason)


def _forced(name: str, source: str, problem: Problem | None) -> tuple[str, str]:
    refusal = why_not(_known(name, source), problem, current_target())
    if refusal is not None:
        raise ValueError(
            f"{source} is {name!r}, which cannot serve this call: {refusal}; "
            "'xla' serves every call on every device"
        )
    reason = f"forced by the {source}" if source == "backend argument" else f"forced by {source}"
    if name in _OPAQUE and not is_told():
        reason += f"; every operand is gathered: {_NOT_TOLD}"
    return name, reason


def _known(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}: this build serves {', '.join(BACKENDS)}")
    return name
