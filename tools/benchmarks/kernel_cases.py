"""A case of the kernel benchmark: candidates on the same inputs, an oracle, and their work."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax


Candidate = Callable[[], Callable[[], Any]]
"""Builds and compiles a candidate; what it returns runs once and waits. Raises what a rival raises
that is not installed or does not take the case."""


UNITS = {"TFLOP/s": 1e12, "GFLOP/s": 1e9, "GB/s": 1e9}
FLOP_RATE = "GFLOP/s" if jax.default_backend() == "cpu" else "TFLOP/s"


# OpenMP's threads spin for 200 ms after a call, on the cores that the next candidate wants.
_SETTLE_S = 0.25 if jax.default_backend() == "cpu" else 0.0


@dataclass(frozen=True)
class Case:
    """One shape of one kernel.

    work: what one call does, in FLOP or bytes, told as `rate`. ceiling: the name of the measured
    one. error: of a candidate's result from the
    oracle's, as a share of the greatest magnitude; None where it was checked elsewhere.
    """

    name: str
    about: str
    work: float
    rate: str
    ceiling: str
    candidates: Mapping[str, Candidate]
    error: Callable[[Any], float] | None
    tolerance: float
    parameters: Mapping[str, Any] = field(default_factory=dict)
    notes: Callable[[], Mapping[str, Any]] | None = None
    ours: tuple[str, ...] = ()
    """Candidates that are ours: a rival's wrong number is shown, ours is a failure."""


@dataclass
class Measured:
    seconds: dict[str, list[float]]
    errors: dict[str, float]
    left_out: dict[str, str]
    wrong: list[str]
    notes: dict[str, Any]


def measure(case: Case, *, rounds: int) -> Measured:
    """Builds every candidate, checks what it gives, then times them in turn."""
    found = Measured({}, {}, {}, [], {})
    calls: dict[str, Callable[[], Any]] = {}
    for name, build in case.candidates.items():
        try:
            call = build()
            result = call()
        except Exception as error:
            if name in case.ours:
                found.wrong.append(f"{name}: {type(error).__name__}: {_first_line(error)}")
            found.left_out[name] = f"{type(error).__name__}: {_first_line(error)}"
            continue
        if case.error is not None:
            found.errors[name] = case.error(result)
            if not found.errors[name] <= case.tolerance and name in case.ours:
                found.wrong.append(
                    f"{name} is off by {found.errors[name]:.1e}, {case.tolerance:.0e} is allowed"
                )
        calls[name] = call
    for call in calls.values():
        call()
    found.seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(_SETTLE_S)
            call()
            begun = time.perf_counter()
            call()
            found.seconds[name].append(time.perf_counter() - begun)
    if case.notes is not None:
        found.notes = dict(case.notes())
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]
