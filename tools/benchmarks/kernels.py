"""Every kernel beside its rivals: same inputs, same run, interleaved, checked against an oracle.

On an accelerator it runs what that accelerator serves. Rivals that are not installed are named and
left out. Numbers that do not agree with the oracle end the run with exit code 1.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from common import median_ratio, write


if TYPE_CHECKING:  # it asks jax which device is there: after the options are read
    from kernel_cases import Case, Measured


@dataclass(frozen=True)
class Options:
    only: tuple[Literal["attention", "decode", "lookup"], ...] = ("attention", "decode", "lookup")
    """Families to run."""
    quick: bool = False
    """Small shapes: does everything run and agree? Its speeds mean nothing."""
    rounds: int = 7
    """Timed calls of each candidate; medians count."""
    match: str = ""
    """Only cases whose name holds this text."""
    out: Path | None = None


def main() -> None:
    options = tyro.cli(Options)
    if "cpu" in _platforms():
        _keep_freed_memory()
    import jax
    import kernel_attention
    import kernel_decode
    import kernel_lookup
    from ceilings import ceilings
    from kernel_cases import FLOP_RATE, UNITS, measure

    device = jax.devices()[0]
    print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}")
    top = ceilings(quick=options.quick)
    for name, value in top.items():
        unit = "GB/s" if name == "copy" else FLOP_RATE
        print(f"ceiling: {name} {value / UNITS[unit]:,.1f} {unit}")
    families = {
        "attention": kernel_attention.cases,
        "decode": kernel_decode.cases,
        "lookup": kernel_lookup.cases,
    }
    results: dict[str, Any] = {}
    wrong = []
    for family in options.only:
        for case in families[family](device, quick=options.quick):
            if options.match not in case.name:
                continue
            found = measure(case, rounds=options.rounds)
            results[case.name] = _told(case, found, top)
            wrong += [f"{case.name}: {line}" for line in found.wrong]
    write(
        options.out,
        "kernels",
        {"device": device.device_kind, "ceilings": top, "cases": results, "wrong": wrong},
        {"jax": jax.__version__, **_rivals()},
    )
    for line in wrong:
        print(f"WRONG: {line}", file=sys.stderr)
    sys.exit(1 if wrong else 0)


def _told(case: Case, found: Measured, top: dict[str, float]) -> dict[str, Any]:
    """Prints a table of one case, and returns what goes into the file."""
    from kernel_cases import UNITS

    print(f"\n{case.name}: {case.about}")
    rows = {}
    for name, seconds in found.seconds.items():
        median = statistics.median(seconds)
        speed = case.work / median
        rate, share = speed / UNITS[case.rate], speed / top[case.ceiling]
        row = {
            "milliseconds": 1e3 * median,
            case.rate: rate,
            "share_of_ceiling": share,
            "error": found.errors.get(name),
            "seconds": seconds,
        }
        others = [other for other in found.seconds if other != name]
        row["times_as_fast_as"] = {o: median_ratio(found.seconds, name, o) for o in others}
        rows[name] = row
        error = "" if row["error"] is None else f"  error {row['error']:.1e}"
        print(f"  {name:<28} {1e3 * median:10.3f} ms {rate:10.1f} {case.rate} {share:6.1%}{error}")
    for name, why in found.left_out.items():
        print(f"  {name:<28} left out: {why}")
    return {
        "about": case.about,
        "parameters": case.parameters,
        "candidates": rows,
        "left_out": found.left_out,
        "notes": found.notes,
    }


def _rivals() -> dict[str, str]:
    import importlib.metadata

    found = {}
    for name in ("jaxlib", "numpy", "torch", "tokamax", "memtrain"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _platforms() -> str:
    import os

    return os.environ.get("JAX_PLATFORMS", "cpu")


def _keep_freed_memory() -> None:
    """As every memtrain command does on CPU; what it sets for the allocator serves rivals too."""
    try:
        from memtrain.runtime import prepare
    except ImportError:
        return
    prepare()


if __name__ == "__main__":
    main()
