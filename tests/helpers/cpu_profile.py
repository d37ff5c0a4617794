"""CPU seconds of every test, and what JAX makes in it: `tools/test --profile`.

Of the processor, children included: on a busy machine the clock says little.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest


# Parts of a program's way to the machine, by the last word of JAX's own events.
PARTS = {
    "jaxpr_trace_duration": "trace",
    "jaxpr_to_mlir_module_duration": "lower",
    "backend_compile_duration": "compile",
}


class Profile:
    """Writes a line a test into `folder`, a file a process."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}.jsonl"
        self.file.unlink(missing_ok=True)
        self.spent: Counter[str] = Counter()
        self.listens = False

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if not self.listens and "jax" in sys.modules:
            sys.modules["jax"].monitoring.register_event_duration_secs_listener(self._listen)
            self.listens = True
        before, began = _cpu(), self.spent.copy()
        yield
        line = {"test": item.nodeid, "cpu": _cpu() - before, **(self.spent - began)}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _listen(self, event: str, seconds: float, **_: object) -> None:
        if part := PARTS.get(event.rsplit("/", 1)[-1]):
            self.spent[part] += seconds  # pyright: ignore[reportArgumentType]
            self.spent["programs"] += part == "compile"


def _cpu() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def show(folder: Path, most: int = 30) -> None:
    """The sums by folder, then the dearest files and tests."""
    tests = [json.loads(x) for file in sorted(folder.glob("*.jsonl")) for x in file.open()]
    print(f"{sum(t['cpu'] for t in tests):8.1f} CPU seconds, {len(tests)} tests")
    for name, depth in (("folder", 2), ("file", None)):
        sums: Counter[str] = Counter()
        for test in tests:
            path = Path(test["test"].split("::")[0])
            sums["/".join(path.parent.parts[:depth]) if depth else str(path)] += test["cpu"]
        print(f"\n     cpu  {name}")
        for key, seconds in sums.most_common(most):
            print(f"{seconds:8.1f}  {key}")
    print("\n     cpu   trace   lower compile  programs  test")
    for test in sorted(tests, key=lambda t: -t["cpu"])[:most]:
        parts = "".join(f"{test.get(part, 0):8.1f}" for part in ("cpu", *PARTS.values()))
        print(f"{parts}{test.get('programs', 0):10}  {test['test']}")


if __name__ == "__main__":
    show(Path(sys.argv[1]))
