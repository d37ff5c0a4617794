"""What every benchmark shares: the machine's description, interleaved timing, and the JSON file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Processor, cores and load: a figure without them means little."""
    model = platform.processor()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": os.getloadavg()[0],
    }


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each candidate, called in turn: a noisy machine is noisy for all of them alike."""
    for call in candidates.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(seconds: Mapping[str, list[float]], ours: str, theirs: str) -> float:
    """How many times as fast `ours` is: the median over rounds of the ratio within a round."""
    pairs = zip(seconds[ours], seconds[theirs], strict=True)
    return statistics.median(b / a for a, b in pairs)


def write(out: Path | None, name: str, results: Mapping[str, Any], versions: Mapping[str, str]):
    """One JSON file: results, command, versions, machine, date."""
    report = {
        "benchmark": name,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["tools/bench", name, *sys.argv[1:]]),
        "versions": dict(versions),
        "machine": machine(),
        "results": dict(results),
    }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"written to {out}")
