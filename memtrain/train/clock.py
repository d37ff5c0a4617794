"""Time of a run: throughput without the pauses, and where the pauses went."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator


class Clock:
    """Seconds since the start; `pause(name)` blocks are counted apart and not as training."""

    def __init__(self):
        self.began = time.perf_counter()
        self.paused: dict[str, float] = defaultdict(float)
        self._mark = self._productive()

    def _productive(self) -> float:
        return time.perf_counter() - self.began - sum(self.paused.values())

    @contextlib.contextmanager
    def pause(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.paused[name] += time.perf_counter() - start

    def lap(self) -> float:
        """Productive seconds since the last lap."""
        now = self._productive()
        seconds, self._mark = now - self._mark, now
        return seconds

    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def goodput(self) -> float:
        """Share of all time that went into steps."""
        return self._productive() / max(self.elapsed(), 1e-9)


def format_seconds(seconds: float) -> str:
    """`8s`, `3m20s`, `2h05m`, `4d03h`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02}h"


def resident_bytes() -> int:
    """Memory of this process that is in RAM, in bytes: now on Linux, the peak elsewhere."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
