"""Which backend serves a call: the candidates, their tables, the choice and its reason."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable
from types import ModuleType

import jax

from memtrain_kernels.announce import Record, say_once
from memtrain_kernels.attention.capabilities import Capabilities, Problem
from memtrain_kernels.partition import is_told, over_devices
from memtrain_kernels.target import Target, current_target


BACKENDS = ("reference", "xla", "tpu", "hopper", "cudnn")
ENVIRONMENT_VARIABLE = "MEMTRAIN_ATTENTION_BACKEND"

# In the order in which they are tried.
_CANDIDATES: dict[str, tuple[str, ...]] = {"tpu": ("tpu",), "gpu": ("hopper", "cudnn")}
_FALLBACK = "xla"
# XLA looks into the others, and splits them over devices by itself.
_OPAQUE = ("tpu", "hopper")
_NOT_TOLD = (
    "there are several devices and the program does not say how it is sharded "
    "(memtrain_kernels.partitioned)"
)

_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"

_record = Record("attention")


def backend_module(name: str) -> ModuleType:
    """The module of a backend, imported at its first use: it has CAPABILITIES and `attend`."""
    return importlib.import_module(f"memtrain_kernels.attention.{name}")


def capabilities(name: str) -> Capabilities:
    """The table of what a backend serves. Raises ValueError for a name that is no backend."""
    return backend_module(_known(name, "backend")).CAPABILITIES


def resolve_backend(backend: str | None = None, problem: Problem | None = None) -> tuple[str, str]:
    """The backend that a call gets, and why: (name, reason).

    The argument wins over the environment variable MEMTRAIN_ATTENTION_BACKEND, which wins over the
    automatic choice: the platform's own kernels where they serve the problem and were verified on
    the device, by us or by a self-check on it at first use, else "xla". Raises ValueError for a
    name that is no backend, and for a forced one that cannot serve. Without a problem, what the
    plainest call would get.
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
        if (
            refusal is None
            and name == "cudnn"
            and _DETERMINISTIC not in os.environ.get("XLA_FLAGS", "")
        ):
            refusal = f"its gradients are not deterministic unless XLA_FLAGS has {_DETERMINISTIC}"
        if refusal is None:
            refusal = _unverified(name, problem, target)
        if refusal is None:
            return name, f"automatic: serves this call on {target.device_kind}"
        passed_over.append(f"{name}: {refusal}")
    if passed_over:
        return _FALLBACK, "automatic, for want of better; " + "; ".join(passed_over)
    return _FALLBACK, "automatic: blockwise, serves every device and every spec"


def attend_with(name: str) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The function of a backend: (q, k, v, q_pos, kv_pos, q_seg, kv_seg, spec) -> (o, lse)."""
    attend = backend_module(name).attend
    return over_devices(attend) if name in _OPAQUE else attend


def why_not(name: str, problem: Problem | None, target: Target) -> str | None:
    """Why a backend cannot serve a problem on a device; None if it can."""
    table = capabilities(name)
    if table.platform is not None and table.platform != target.platform:
        return f"runs on {table.platform}, this is {target.platform}"
    kinds = table.device_kinds
    if kinds is not None and not any(
        re.search(rf"\b{re.escape(kind)}\b", target.device_kind) for kind in kinds
    ):
        return f"runs on {', '.join(kinds)}, this is {target.device_kind}"
    return None if problem is None else table.refusal(problem)


def is_verified(name: str, device_kind: str) -> bool:
    """Whether a backend's numbers were checked on this kind of device, as its table says."""
    return any(kind in ("*", device_kind) for kind in capabilities(name).verified_on)


def last_backend() -> str | None:
    """The backend of the most recent attention call, None before the first.

    A call inside jit counts when it is traced: a cached program does not count again.
    """
    return _record.last


def backend_counts() -> dict[str, int]:
    """How many attention calls each backend has served in this process (jit: traced)."""
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
    if name == "cudnn" and _DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
        reason += f"; its gradients are not deterministic: XLA_FLAGS lacks {_DETERMINISTIC}"
    if name in _OPAQUE and not is_told():
        reason += f"; every operand is gathered: {_NOT_TOLD}"
    return name, reason


def _unverified(name: str, problem: Problem | None, target: Target) -> str | None:
    """Why an unverified backend is not taken; None if it is verified or passes its self-check."""
    if is_verified(name, target.device_kind):
        return None
    if not target.is_here:
        return f"unverified on {target.device_kind}, which is not here to check it"
    from memtrain_kernels.attention.self_check import self_check

    result = self_check(name, target, problem)
    say_once(result.line)
    return None if result.passed else result.line


def _known(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}: this build serves {', '.join(BACKENDS)}")
    return name
