"""Compiles the flagship's whole train step for machines that are not here, and keeps what is said.

Each row of the table is `memtrain plan` with a target (experiments/flagship.py): the compiler's own
memory beside the estimate, the ring's permutes that have a kernel to hide behind, the step's
predicted time. A row that its compiler refuses is kept with the reason. A row of several lengths is
the longest that fits, found by bisection. Rows are compiled one after another, each in a process of
its own, and written as they come: what was kept before is replaced row by row. --estimates makes
the estimates of kept rows anew and leaves alone what compilers said.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "plan-table.json"
PAGE = ROOT / "docs" / "results" / "plan-table.md"
RECIPE = "experiments/flagship.py"
VERSIONS = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc")
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Row:
    """One compilation. asserted: it has to fit; overlaps: all its permutes beside kernels.

    lengths: first, last and step of the `train.seq_len` among which the longest that fits is
    looked for.
    """

    name: str
    function: str
    target: str
    settings: tuple[str, ...] = ()
    asserted: bool = True
    overlaps: bool = True
    lengths: tuple[int, int, int] | None = None


ROWS = (
    Row("one-million", "recipe", "v5p:4x4x4"),
    Row("four-million", "four_million", "v5p:8x8x8"),
    Row("sixteen-million", "sixteen_million", "v5p:8x16x16"),
    # Short of memory, XLA on GPU runs permutes of the backward by themselves: counted, no more.
    Row("hopper-1024k", "hopper", "h200x8", overlaps=False),
    Row(
        "hopper-longest",
        "hopper",
        "h200x8",
        overlaps=False,
        lengths=(2**20 + 2**17, 2**21, 2**17),
    ),
)


def compile_row(row: Row, seq_len: int | None) -> dict[str, Any]:
    """What `memtrain plan` says of the row, in this process; `refused` where its compiler does."""
    from memtrain.errors import BadInput

    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    shown = planned(row, seq_len, compiles=False)
    try:
        shown = planned(row, seq_len, compiles=True)
    except BadInput as error:
        shown["refused"] = str(error)
    return _kept(shown)


def planned(row: Row, seq_len: int | None, *, compiles: bool) -> dict[str, Any]:
    """`memtrain plan --json` of the row."""
    from memtrain.commands import Plan

    settings = row.settings if seq_len is None else (*row.settings, f"train.seq_len={seq_len}")
    recipe = f"{ROOT / RECIPE}:{row.function}"
    return Plan(recipe=recipe, target=row.target, set=settings, no_compile=not compiles).run()


def _kept(shown: dict[str, Any]) -> dict[str, Any]:
    """What the table tells of a plan."""
    memory, step = shown["memory"], shown["step"]
    peak = {part: row["at_peak"] for part, row in memory["parts"].items() if row["at_peak"]}
    names = ("num_devices", "mesh", "batch_size", "seq_len", "remat", "num_parameters", "context")
    kept = {name: shown[name] for name in names}
    if kept["context"]:
        kept["context"]["hops"] = max(kept["context"]["hops"].values(), default=0)
    kept["device_bytes"] = memory["device_bytes"]
    kept["estimate"] = {
        "bytes_per_device": memory["bytes_per_device"],
        "moment": memory["peak_moment"],
        "parts": peak,
        "longest_seq_len": shown.get("longest_seq_len"),
    }
    names = ("seconds", "tokens_per_second", "mfu", "bound")
    kept["step"] = {name: step[name] for name in names}
    if "refused" in shown:
        return kept | {"refused": shown["refused"]}
    if "compiled" not in shown:
        return kept
    compiled = shown["compiled"]
    return kept | {
        "compiled": compiled,
        "fits": compiled["bytes_per_device"] <= memory["device_bytes"],
    }


def run_row(row: Row, minutes: float) -> dict[str, Any]:
    """The row compiled; of several lengths, the longest that fits."""
    began = time.perf_counter()
    found = _compiled_apart(row, None, minutes) if row.lengths is None else _longest(row, minutes)
    return {
        **dataclasses.asdict(row),
        "recipe": f"{RECIPE}:{row.function}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions(),
        "wall_s": round(time.perf_counter() - began, 1),
        **found,
    }


def _compiled_apart(row: Row, seq_len: int | None, minutes: float) -> dict[str, Any]:
    """In a process of its own, which may die: libtpu aborts, the kernel kills."""
    command = [sys.executable, __file__, "--row", row.name]
    command += [] if seq_len is None else ["--seq-len", str(seq_len)]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, timeout=60 * minutes, check=False
        )
    except subprocess.TimeoutExpired:
        return {"refused": f"not compiled after {minutes:g} minutes"}
    if done.returncode:
        return {"refused": f"the compiler's process ended with {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def _longest(row: Row, minutes: float) -> dict[str, Any]:
    """What is kept of the longest that fits, and in `tried` what was compiled on the way to it."""
    assert row.lengths is not None
    first, last, step = row.lengths
    lengths = range(first, last + 1, step)
    found: dict[str, Any] = {"refused": f"not even {first:,} tokens fit"}
    tried = []
    fit, too_long = -1, len(lengths)
    while too_long - fit > 1:
        middle = (fit + too_long) // 2
        one = _compiled_apart(row, lengths[middle], minutes)
        fits = one.get("fits", False)
        said = (
            {"bytes_per_device": one["compiled"]["bytes_per_device"]} if "compiled" in one else {}
        )
        said |= {"refused": one["refused"]} if "refused" in one else {}
        tried.append({"seq_len": lengths[middle], "fits": fits, **said})
        print(f"aot: {row.name}: {tried[-1]}", file=sys.stderr, flush=True)
        if fits:
            fit, found = middle, one
        else:
            too_long = middle
    return {**found, "tried": tried}


def estimated_anew(kept: dict[str, Any]) -> dict[str, Any]:
    """The kept row with the estimates of now beside what its compiler said."""
    if "seq_len" not in kept:
        return kept
    row = next(row for row in ROWS if row.name == kept["name"])
    seq_len = None if row.lengths is None else kept["seq_len"]
    fresh = _kept(planned(row, seq_len, compiles=False))
    kept = {**kept, **{name: fresh[name] for name in ("estimate", "step", "context")}}
    if "compiled" in kept:
        ratio = fresh["estimate"]["bytes_per_device"] / kept["compiled"]["bytes_per_device"]
        kept["compiled"] = {**kept["compiled"], "estimate_over_compiler": ratio}
    return kept


def versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def judge(rows: list[dict[str, Any]]) -> list[str]:
    """What is wrong with the asserted rows, in words."""
    wrong = []
    for row in rows:
        if not row["asserted"]:
            continue
        if "refused" in row:
            wrong.append(f"{row['name']}: {row['refused']}")
            continue
        if not row["fits"]:
            over = row["compiled"]["bytes_per_device"] - row["device_bytes"]
            wrong.append(f"{row['name']}: {over / GIB:.1f} GiB too large for a device")
        for way in ("forward", "backward") if row["overlaps"] else ():
            seen = row["compiled"]["permutes"][way]
            total = seen["synchronous"] + seen["asynchronous"]
            if not total:
                wrong.append(f"{row['name']}, {way}: no permute at all")
            if seen["overlapping"] < total:
                wrong.append(
                    f"{row['name']}, {way}: {seen['overlapping']} of {total} permutes overlap"
                )
    return wrong


def as_page(rows: list[dict[str, Any]]) -> str:
    """docs/results/plan-table.md."""
    head = (
        "recipe",
        "target",
        "tokens of a row",
        "mesh",
        "compiler, GiB a device",
        "estimate, GiB",
        "fits",
        "ring permutes beside a kernel",
        "step, predicted",
        "compiled in",
    )
    lines = [f"| {' | '.join(head)} |", "|-" * len(head) + "|"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    versions: dict[str, str] = {}
    for row in rows:
        versions |= row["versions"]
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    parameters = max((row.get("num_parameters", 0) for row in rows), default=0)
    return _PAGE.format(
        table="\n".join(lines),
        versions=said,
        parameters=f"{parameters:,}",
        longest="".join(_about_longest(row) for row in rows if row.get("tried")),
    )


def _about_longest(row: dict[str, Any]) -> str:
    step = row["lengths"][2]
    tried = ", ".join(
        f"{one['seq_len'] // 1024:,}K {'fits' if one['fits'] else 'does not'}"
        for one in sorted(row["tried"], key=lambda one: one["seq_len"])
    )
    return f"Of `{row['target']}`'s rows one is the longest, in steps of {step:,}: {tried}.\n"


_PAGE = """# What the compilers say of the flagship

Written by `tools/aot plan-table` and `tools/aot plan-table-hopper`: the whole train step of
`experiments/flagship.py` ({parameters} parameters: 32 layers of width 4,096, and a memory of
16,777,216 slots), compiled for machines that are not here.

{table}

The compiler's figure is all that one device's program sets aside, of what the device has:
arguments, temporaries, and outputs that take no argument's place. Permutes are counted in the
compiled schedule, forward / backward, and a loop's body once; what is recomputed counts as
backward. The predicted time is a roofline's (docs/plan.md), never a measurement.
{longest}{versions}.
"""


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [f"`{Path(row['recipe']).name}`", f"`{row['target']}`"]
    if "seq_len" not in row:
        return [*cells, "", "", row["refused"], "", "no", "", "", f"{row['wall_s']:,.0f} s"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1)
    estimate, step = row["estimate"]["bytes_per_device"], row["step"]
    predicted = (
        f"{step['seconds']:,.3g} s, {step['tokens_per_second']:,.0f} tokens/s, "
        f"MFU {step['mfu']:.0%}, bound by {step['bound']}"
    )
    has = row["device_bytes"] / GIB
    cells += [f"{row['seq_len']:,}", mesh]
    if "refused" in row:
        said = [row["refused"], f"{estimate / GIB:.1f}", "no", ""]
        return [*cells, *said, predicted, f"{row['wall_s']:,.0f} s"]
    compiled = row["compiled"]
    permutes = []
    for way in ("forward", "backward"):
        seen = compiled["permutes"][way]
        total = seen["synchronous"] + seen["asynchronous"]
        permutes.append(f"{seen['overlapping']} of {total}")
    needed, arguments = compiled["bytes_per_device"], compiled["arguments"]
    bound = "" if compiled.get("allocated") else "at most "
    return [
        *cells,
        f"{bound}{needed / GIB:.1f} of {has:.1f} (arguments {arguments / GIB:.1f}, the rest "
        f"{(needed - arguments) / GIB:.1f})",
        f"{estimate / GIB:.1f} ({estimate / needed:.0%}{' or more' if bound else ''})",
        "yes" if row["fits"] else "**no**",
        " / ".join(permutes),
        predicted,
        f"{compiled['seconds']:,.0f} s",
    ]


def write(rows: list[dict[str, Any]], out: Path) -> None:
    """In the order of ROWS."""
    order = [row.name for row in ROWS]
    rows = sorted(rows, key=lambda row: order.index(row["name"]))
    content = {
        "machine": f"{platform.system()} {platform.machine()}: compiled, not run",
        "wrong": judge(rows),
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read(out: Path) -> list[dict[str, Any]]:
    """Rows kept before that are still asked for, with what is asked of them now."""
    if not out.exists():
        return []
    asked = {row.name: dataclasses.asdict(row) for row in ROWS}
    found = []
    for kept in json.loads(out.read_text(encoding="utf-8"))["rows"]:
        row = asked.get(kept["name"])
        compiled = ("function", "target", "settings", "lengths")
        if row is not None and all(_same(row[k], kept.get(k)) for k in compiled):
            found.append({**kept, **row})
    return found


def _same(asked: Any, kept: Any) -> bool:
    """JSON has lists where there were tuples."""
    return kept == (list(asked) if isinstance(asked, tuple) else asked)


def main(tpu: bool = True) -> int:
    """tpu: which of the two compilers is here."""
    name = "plan-table" if tpu else "plan-table-hopper"
    parser = argparse.ArgumentParser(prog=f"tools/aot {name}", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smallest row")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--out", type=Path, help=f"the JSON (the kept one is {RESULTS.name})")
    parser.add_argument("--page", action="store_true", help=f"write docs/results/{PAGE.name} too")
    parser.add_argument("--minutes", type=float, default=180, help="that a row may take (180)")
    parser.add_argument("--estimates", action="store_true", help="of kept rows; compile nothing")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--seq-len", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row is not None:
        row = next(row for row in ROWS if row.name == options.row)
        print(json.dumps(compile_row(row, options.seq_len)))
        return 0
    if options.estimates:
        return _estimates(options.out or RESULTS, options.page)
    todo = [r for r in ROWS if r.target.startswith("v") == tpu and options.only in r.name]
    if not todo:
        print(f"aot: no row's name holds {options.only!r}", file=sys.stderr)
        return 2
    done = []
    for row in todo[:1] if options.quick else todo:
        print(f"aot: {row.name}: {row.function} for {row.target}", file=sys.stderr, flush=True)
        done.append(run_row(row, options.minutes))
        print(" | ".join(_cells(done[-1])), flush=True)
        if options.out is not None:
            # Read again each time: the other compiler's rows may have come meanwhile.
            others = [kept for kept in read(options.out) if kept["name"] != row.name]
            write([*others, done[-1]], options.out)
    if options.page and options.out is not None:
        PAGE.write_text(as_page(read(options.out)), encoding="utf-8")
    wrong = judge(done)
    for line in wrong:
        print(f"WRONG {line}", file=sys.stderr)
    return 1 if wrong else 0


def _estimates(out: Path, page: bool) -> int:
    rows = [estimated_anew(row) for row in read(out)]
    write(rows, out)
    for row in rows:
        print(" | ".join(_cells(row)), flush=True)
    if page:
        PAGE.write_text(as_page(rows), encoding="utf-8")
    return 1 if judge(rows) else 0


# Here is no memtrain installed, only what it needs.
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

if __name__ == "__main__":
    sys.exit(main())
