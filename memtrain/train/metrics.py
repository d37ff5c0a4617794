"""metrics.jsonl, always; TensorBoard through the `tracking` extra."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memtrain.errors import BadInput
from memtrain.files import write_whole


FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends one JSON object a line, each with its `step`. Written by the first process only.

    A run that resumes at a step forgets the lines after it: they are about to be written again.
    """

    def __init__(self, run_dir: Path, *, resume_step: int, tensorboard: bool, enabled: bool = True):
        self._file = None
        self._events = None
        if not enabled:
            return
        path = run_dir / FILE_NAME
        kept = [line for line in read_lines(path) if line["step"] <= resume_step]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            self._events = _event_writer(run_dir, resume_step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers, and lists of numbers. What is not finite is written as null: JSON has no word
        for it."""
        if self._file is None:
            return
        line = {"step": step, **{name: _plain(value) for name, value in values.items()}}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in line.items():
                if name != "step" and isinstance(value, int | float):
                    self._events.add_scalar(name, value, step)

    def close(self) -> None:
        for sink in (self._file, self._events):
            if sink is not None:
                sink.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file. A last line that a kill cut short is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, str | bool | int):
        return value
    value = float(value)
    return value if math.isfinite(value) else None


def need_tensorboard() -> Any:
    """The writer's class. Raises BadInput naming the extra where it is not installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise BadInput(
            "train.tensorboard=true needs the `tracking` extra: pip install 'memtrain[tracking]'"
        ) from None
    return SummaryWriter


def _event_writer(run_dir: Path, resume_step: int) -> Any:
    return need_tensorboard()(str(run_dir / "tensorboard"), purge_step=resume_step + 1)
