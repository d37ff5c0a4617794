"""A bar at the foot of the terminal while a run goes on; plain lines everywhere else."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TextIO


Say = Callable[[str], None]
OnStep = Callable[[int, int], None]
"""Called with the steps begun so far and the number of steps of the run."""


@contextlib.contextmanager
def progress(stream: TextIO | None = None) -> Iterator[tuple[Say, OnStep | None]]:
    """How to say a line and how to tell a step: on a terminal, lines scroll above a bar.

    Where `stream` (stdout unless given) is no terminal, lines are printed as they are and nothing
    asks for the steps.
    """
    out = sys.stdout if stream is None else stream
    if not out.isatty():
        yield (lambda line: print(line, file=out, flush=True)), None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(file=out, highlight=False, markup=False, soft_wrap=True)
    bar = Progress(
        TextColumn("training"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=4,
        transient=True,  # The lines are the record; a finished bar says nothing.
    )
    task = bar.add_task("", total=None, start=False)

    def on_step(step: int, num_steps: int) -> None:
        first = not bar.tasks[0].started
        if first or step < bar.tasks[0].completed:  # The next seed's run begins anew.
            # What an earlier process did must not count as speed.
            bar.reset(task, total=num_steps, completed=step, start=True)
        bar.update(task, completed=step)

    with bar:
        yield (lambda line: console.print(line)), on_step
