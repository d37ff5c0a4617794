"""A profiler trace of a window of steps, on request."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax


class Profiler:
    """Traces steps `first` to `last` (from 0, both) into RUN/profile, for XProf or Perfetto.

    A run that begins inside the window traces the rest of it.
    """

    def __init__(self, run_dir: Path, steps: tuple[int, int] | None):
        self._folder = run_dir / "profile"
        self._steps = steps
        self._is_tracing = False

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the dispatch of one step."""
        if self._steps is None or not self._steps[0] <= step <= self._steps[1]:
            yield
            return
        if not self._is_tracing:
            jax.profiler.start_trace(str(self._folder))
            self._is_tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def after(self, step: int, outputs: Any) -> None:
        """Ends the trace after its last step; `outputs` are what that step computes."""
        if self._is_tracing and self._steps is not None and step >= self._steps[1]:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        """Ends the trace, where one is under way: a run may stop inside the window."""
        if self._is_tracing:
            self._is_tracing = False
            jax.profiler.stop_trace()
