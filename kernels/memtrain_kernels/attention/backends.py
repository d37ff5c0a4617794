"""Which backend serves a call: the choice, its reason, and a record of what ran."""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from typing import TextIO


BACKENDS = ("reference", "xla")
ENVIRONMENT_VARIABLE = "MEMTRAIN_ATTENTION_BACKEND"

_logger = logging.getLogger("memtrain_kernels")
_announced: set[tuple[str, str]] = set()
_served: Counter[str] = Counter()
_last: list[str] = []


def resolve_backend(backend: str | None = None) -> tuple[str, str]:
    """The backend that a call with this argument gets, and why: (name, reason).

    The argument wins over the environment variable MEMTRAIN_ATTENTION_BACKEND, which wins over the
    automatic choice. Raises ValueError for a name that is no backend.
    """
    if backend is not None:
        return _known(backend, "backend argument"), "forced by the backend argument"
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    if forced:
        return _known(forced, ENVIRONMENT_VARIABLE), f"forced by {ENVIRONMENT_VARIABLE}"
    return "xla", "automatic: blockwise, serves every device and every spec"


def last_backend() -> str | None:
    """The backend of the most recent attention call, None before the first.

    A call inside jit counts when it is traced: a cached program does not count again.
    """
    return _last[0] if _last else None


def backend_counts() -> dict[str, int]:
    """How many attention calls each backend has served in this process (jit: traced)."""
    return dict(_served)


def record(name: str, reason: str) -> None:
    """Count a call and announce its backend, once a reason."""
    _served[name] += 1
    _last[:] = [name]
    if (name, reason) not in _announced:
        _announced.add((name, reason))
        _show_on_stderr()
        _logger.info("attention backend: %s (%s)", name, reason)


def _known(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}: this build serves {', '.join(BACKENDS)}")
    return name


class _Stderr(logging.StreamHandler):
    """Writes to whatever sys.stderr is at the time, as logging's own last resort does."""

    def __init__(self) -> None:
        logging.Handler.__init__(self, logging.INFO)

    @property
    def stream(self) -> TextIO:
        return sys.stderr


def _show_on_stderr() -> None:
    # An application that set up logging sees the line there; in any other it still must be seen.
    if _logger.level == logging.NOTSET:
        _logger.setLevel(logging.INFO)
    if not _logger.hasHandlers():
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        _logger.addHandler(handler)
