"""Compiles ring attention for TPU slices that are described, not there, and reads its schedule.

`context_attention` inside `jax.shard_map` over every chip of a slice, forward and backward, with
the TPU kernels. Asked of each program: that a kernel stands between the start and the end of every
permute (they run side by side then), that scalar memory is bounded, and that what a chip needs
beside its share does not grow with the slice. On v5e from 32 chips on the compiler makes permutes
synchronous; that is reported, with what the other strategies become there, and not asserted.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


# The lock keeps two programs off one chip, and here is none.
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax
import jax.numpy as jnp
import tpu
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from memtrain_kernels import AttentionSpec, Layout, compiling_for, context_attention
from memtrain_kernels.context import plan_ring


TOKENS_PER_CHIP = 16384
WINDOW = 4096
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """One program: `tokens` a chip, queries on `heads` heads of 128.

    asserted: every permute of it has to run beside a kernel. in_flight: how many permutes the
    compiler may hold in flight at a time; None: as it likes.
    """

    topology: str
    kv_heads: int = 2
    layout: Any = "zigzag"
    window: int | None = None
    strategy: Any = "ring"
    heads: int = 8
    tokens: int = TOKENS_PER_CHIP
    asserted: bool = True
    in_flight: int | None = None

    @property
    def name(self) -> str:
        mask = "causal" if self.window is None else f"window {self.window}"
        heads = f"{self.heads}/{self.kv_heads} heads"
        flying = "" if self.in_flight is None else f", {self.in_flight} in flight"
        return f"{self.topology}, {self.strategy}, {self.layout}, {mask}, {heads}{flying}"


def cases(quick: bool) -> Iterator[Case]:
    if quick:
        yield Case("v5p:4x4x4")
        return
    for topology in ("v5e:4x4", "v5p:4x4x4", "v5p:8x8x8", "v6e:8x8", "v6e:16x16"):
        for kv_heads in (2, 8):
            yield Case(topology, kv_heads)
            yield Case(topology, kv_heads, "contiguous", WINDOW)
    yield Case("v5p:8x8x16")
    yield Case("v5e:4x8", asserted=False)
    yield Case("v5e:8x8", asserted=False)
    yield Case("v5e:8x8", layout="contiguous", window=WINDOW, asserted=False)
    # One head a chip after the exchange, 4K tokens of 64 heads before it.
    yield Case("v5e:8x8", 64, "contiguous", None, "ulysses", heads=64, tokens=4096, asserted=False)
    yield Case("v5e:8x8", layout="contiguous", strategy="all_gather", asserted=False)


def program(
    case: Case, mesh: Mesh, backend: str, is_ambient: bool = False
) -> tuple[Callable, list[jax.ShapeDtypeStruct]]:
    """The gradients of a sum of the attention's output, and abstract arguments.

    is_ambient: it is traced under an abstract mesh, which shard_map takes instead.
    """
    along = P(None, "context")
    sharding = NamedSharding(mesh, along)

    def abstract(heads: int) -> jax.ShapeDtypeStruct:
        shape = (1, case.tokens * mesh.size, heads, 128)
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    def local(q, k, v) -> Any:
        return context_attention(
            q,
            k,
            v,
            axis="context",
            layout=case.layout,
            strategy=case.strategy,
            spec=AttentionSpec(window=case.window),
            backend=backend,
        )

    # check_vma=False as in the library: kernels say nothing of how their outputs vary.
    sharded = jax.shard_map(
        local,
        mesh=None if is_ambient else mesh,
        in_specs=along,
        out_specs=along,
        check_vma=False,
    )

    def gradients(q, k, v, weights):
        def loss(q, k, v):
            return jnp.sum(sharded(q, k, v).astype(jnp.float32) * weights)

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    q, k = abstract(case.heads), abstract(case.kv_heads)
    return gradients, [q, k, k, q]


def bare_permute(mesh: Mesh) -> tuple[Callable, list[jax.ShapeDtypeStruct]]:
    """The control: a permute that has no kernel beside it, as the kernel needs what it brings."""
    along = P(None, "context")

    def local(q, k, v):
        ring = [(i, (i + 1) % mesh.size) for i in range(mesh.size)]
        moved = jax.lax.ppermute(jnp.stack([k, v]), "context", ring)
        return context_attention(
            q, *moved, axis="context", spec=AttentionSpec(window=1), backend="tpu"
        )

    shape = (1, 1024 * mesh.size, 2, 128)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, along))
    sharded = jax.shard_map(local, mesh=mesh, in_specs=along, out_specs=along, check_vma=False)
    return sharded, [x] * 3


def hops_of(case: Case, chips: int) -> int | None:
    """Hops of the ring's schedule; None for another strategy."""
    if case.strategy != "ring":
        return None
    spec, layout = AttentionSpec(window=case.window), Layout(case.layout, chips)
    schedule, _ = plan_ring(spec, layout, case.tokens, case.tokens, by_default=True, segments=False)
    return schedule.hops


def row_of(case: Case, mesh: Mesh, compiled: Any, seconds: float) -> dict:
    """What the compiled program says, in JSON's types."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None:
        raise RuntimeError(f"{case.name}: the compiler reports no memory or no program")
    overlap = tpu.of_memtrain("plan/overlap.py").permute_overlap(text)
    exchanges = ("all-gather", "all-to-all", "reduce-scatter")
    return {
        **dataclasses.asdict(case),
        "case": case.name,
        "device": mesh.devices.flat[0].device_kind,
        "chips": mesh.size,
        "tokens": case.tokens * mesh.size,
        "hops": hops_of(case, mesh.size),
        "forward": dataclasses.asdict(overlap.forward),
        "backward": dataclasses.asdict(overlap.backward),
        "kernels": overlap.kernels,
        "exchanges": {
            name: {
                "synchronous": text.count(f" {name}("),
                "asynchronous": text.count(f" {name}-start("),
            }
            for name in exchanges
            if name in text
        },
        "arguments_mib": round(memory.argument_size_in_bytes / 2**20, 1),
        "temporaries_mib": round(memory.temp_size_in_bytes / 2**20, 1),
        "compile_s": round(seconds, 1),
    }


def compile_tpu(case: Case) -> dict:
    mesh = tpu.mesh_of(case.topology)
    fn, arguments = program(case, mesh, "tpu")
    began = time.perf_counter()
    with compiling_for("tpu", mesh.devices.flat[0].device_kind):
        lowered = jax.jit(fn).trace(*arguments).lower(lowering_platforms=("tpu",))
    compiled = lowered.compile()
    row = row_of(case, mesh, compiled, time.perf_counter() - began)
    scalars = tpu.scalar_bytes(compiled.as_text() or "")
    return {**row, "scalar_bytes": scalars, "scalar_bytes_allowed": tpu.SCALAR_BYTES_ALLOWED}


def control() -> dict:
    """What is counted of a permute that overlaps nothing."""
    mesh = tpu.mesh_of("v5e:2x2")
    fn, arguments = bare_permute(mesh)
    with compiling_for("tpu", mesh.devices.flat[0].device_kind):
        lowered = jax.jit(fn).trace(*arguments).lower(lowering_platforms=("tpu",))
    overlap = tpu.of_memtrain("plan/overlap.py").permute_overlap(lowered.compile().as_text() or "")
    return {**dataclasses.asdict(overlap.forward), "kernels": overlap.kernels}


def judge(rows: list[dict]) -> list[str]:
    """What is wrong with the results, in words."""
    wrong = []
    for row in rows:
        for what in ("forward", "backward") if row["asserted"] else ():
            seen = row[what]
            total = seen["synchronous"] + seen["asynchronous"]
            if not total:
                wrong.append(f"{row['case']}, {what}: no permute at all")
            if seen["overlapping"] < total:
                wrong.append(
                    f"{row['case']}, {what}: {seen['overlapping']} of {total} permutes run beside "
                    f"a kernel, {seen['synchronous']} are synchronous"
                )
        for kernel, size in row.get("scalar_bytes", {}).items():
            if size > row["scalar_bytes_allowed"]:
                wrong.append(f"{row['case']}: {kernel} takes {size} bytes of scalar memory")
    alike: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["strategy"] == "ring" and row["asserted"]:
            kind = row["device"], row["kv_heads"], row["layout"], row["window"]
            alike.setdefault(kind, []).append(row)
    for over in alike.values():
        sizes = {f"{row['chips']} chips": row["temporaries_mib"] for row in over}
        if max(sizes.values()) > 1.01 * min(sizes.values()):
            wrong.append(f"{over[0]['case']}: temporaries grow with the slice: {sizes} MiB")
    return wrong


def line_of(row: dict) -> str:
    def counts(what: str) -> str:
        seen = row[what]
        total = seen["synchronous"] + seen["asynchronous"]
        return f"{seen['overlapping']}/{total}"

    exchanges = [f"{n} {c['asynchronous']} async" for n, c in row["exchanges"].items()]
    return (
        f"{row['case']:58} {row['tokens'] / 2**20:6.2f}M {row['hops'] or '-':>5} hops, "
        f"beside a kernel {counts('forward'):>5} {counts('backward'):>5}, "
        f"{row['temporaries_mib']:6,.0f} MiB, {row['compile_s']:5.1f} s {', '.join(exchanges)}"
    )


def report(options: argparse.Namespace, compile_case: Callable[[Case], dict], todo: list[Case]):
    """Compiles all cases, prints a line each; (rows, refused)."""
    rows, refused = [], []
    for case in todo:
        if options.only not in case.name:
            continue
        try:
            row = compile_case(case)
        except jax.errors.JaxRuntimeError as error:
            refused.append({"case": case.name, "error": str(error)[:2000]})
            print(f"REFUSED {case.name}: {str(error)[:500]}", flush=True)
            continue
        rows.append(row)
        print(line_of(row), flush=True)
    return rows, refused


def parse(prog: str, description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--quick", action="store_true", help="one case")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--out", type=Path, help=f"the JSON (kept ones are in {RESULTS.name}/)")
    return parser.parse_args()


def finish(
    options: argparse.Namespace,
    rows: list[dict],
    refused: list[dict],
    wrong: list[str],
    packages: tuple[str, ...],
    **more: Any,
) -> int:
    """Writes the JSON, prints what is wrong; the exit code."""
    if not rows and not refused:
        print(f"aot: no case's name holds {options.only!r}", file=sys.stderr)
        return 2
    wrong = wrong + [f"{entry['case']}: refused by the compiler" for entry in refused]
    if options.out is not None:
        content = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "machine": f"{platform.system()} {platform.machine()}: compiled, not run",
            "quick": options.quick,
            "wrong": wrong,
            "refused": refused,
            **more,
            "compiled": rows,
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for line in wrong:
        print(f"WRONG {line}", file=sys.stderr)
    print(f"{len(rows)} programs compiled, {len(refused)} refused, {len(wrong)} wrong")
    return 1 if wrong else 0


def main() -> int:
    options = parse("tools/aot ring", __doc__)
    rows, refused = report(options, compile_tpu, list(cases(options.quick)))
    wrong = judge(rows)
    seen = control()
    if seen["overlapping"] or seen["asynchronous"] + seen["synchronous"] != 1:
        wrong.append(f"the permute that overlaps nothing was read as {seen}")
    packages = ("jax", "jaxlib", "libtpu")
    return finish(options, rows, refused, wrong, packages, control_bare_permute=seen)


if __name__ == "__main__":
    sys.exit(main())
