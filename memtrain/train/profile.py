"""A profiler trace of a window of steps, on request."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from memtrain.errors import BadInput


class Profiler:
    """Traces steps `first` to `last` (from 0, both) into RUN/profile, for XProf or Perfetto."""

    def __init__(self, run_dir: Path, steps: tuple[int, int] | None):
        if steps is not None and not 0 <= steps[0] <= steps[1]:
            raise BadInput(f"train.profile_steps={steps}: first,last with 0 <= first <= last")
        self._folder = run_dir / "profile"
        self._steps = steps

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the dispatch of one step."""
        if self._steps is None:
            yield
            return
        first, last = self._steps
        if step == first:
            jax.profiler.start_trace(str(self._folder))
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if step == last:
            # What was dispatched must end inside the trace.
            jax.effects_barrier()
            (jax.device_put(0.0) + 0).block_until_ready()
            jax.profiler.stop_trace()
