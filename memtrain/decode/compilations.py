"""How often XLA compiled: the proof that decoding does not compile anew."""

from __future__ import annotations

import threading

import jax


_EVENT = "/jax/core/compile/backend_compile_duration"
_counts = threading.local()
_listening = threading.Lock()


def _count(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == _EVENT:
        _counts.programs = getattr(_counts, "programs", 0) + 1


def compiled_programs() -> int:
    """Programs compiled by this thread since the first call of this function.

    Programs that the persistent compilation cache gave back count too: they were not in memory.
    """
    if _listening.acquire(blocking=False):  # for good: a listener is entered once a process
        jax.monitoring.register_event_duration_secs_listener(_count)
    return getattr(_counts, "programs", 0)
