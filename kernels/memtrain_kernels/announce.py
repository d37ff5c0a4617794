"""What ran: every choice of a backend is counted, and said once with its reason."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from typing import TextIO


_logger = logging.getLogger("memtrain_kernels")
_announced: set[str] = set()


class Record:
    """The choices of one family of functions, such as "attention"."""

    def __init__(self, family: str) -> None:
        self.family = family
        self._served: Counter[str] = Counter()
        self._last: str | None = None

    def add(self, name: str, reason: str) -> None:
        """Counts a call and announces its backend, once a reason."""
        self._served[name] += 1
        self._last = name
        say_once(f"{self.family} backend: {name} ({reason})")

    @property
    def last(self) -> str | None:
        return self._last

    def counts(self) -> dict[str, int]:
        return dict(self._served)


def say_once(line: str) -> None:
    """Logs a line the first time it is given."""
    if line not in _announced:
        _announced.add(line)
        _show_on_stderr()
        _logger.info("%s", line)


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
