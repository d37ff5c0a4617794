"""Compiles the Hopper decode kernel for an H200 that is described, not there.

As hopper.py: XLA's GPU compiler takes an abstract H200, Mosaic GPU included, and refuses a kernel
that does not fit shared memory; ptxas then assembles the kernel's PTX for sm_90a and says what it
uses. Of each variant: registers, spills, shared memory, whether wgmma is serialized, and how many
thread blocks share a multiprocessor, which must be at least what the choice of splits counts on.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


# Its first lines prepare the environment of jax: it comes before jax.
from hopper import H200, RESULTS, SHARED_BYTES_ALLOWED, captured_stdout, split_ptx  # isort: skip

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from memtrain_kernels.attention import AttentionSpec
from memtrain_kernels.decode import hopper
from memtrain_kernels.decode.hopper.plan import blocks_per_multiprocessor, make_plan
from memtrain_kernels.decode.paging import Pages


KERNEL = "decode_attention"
SHARED_BYTES_OF_MULTIPROCESSOR = 228 * 1024
PLAIN = AttentionSpec()
RICH = AttentionSpec(window=1024, sink_tokens=4, prefix=7, soft_cap=30.0)


@dataclass(frozen=True)
class Case:
    """One call: 8 rows of T queries, `group` query heads on each of 4 key heads, 32K tokens."""

    dim: int
    pages: str
    value_dim: int | None = None
    page_size: int = 64
    T: int = 1
    group: int = 8
    dtype: str = "bfloat16"
    per_page: bool = False
    spec: AttentionSpec = PLAIN

    @property
    def name(self) -> str:
        dims = f"{self.dim}" if self.value_dim is None else f"{self.dim}/{self.value_dim}"
        parts = [f"dim {dims}", f"{self.dtype} on {self.pages} pages of {self.page_size}"]
        parts.append(f"{self.T} x {self.group} queries")
        parts += ["scales a page"] * self.per_page
        parts += ["window, sinks, prefix, soft cap"] * (self.spec is RICH)
        return ", ".join(parts)


def cases(quick: bool) -> Iterator[Case]:
    kinds = ("bfloat16", "int8", "float8_e4m3fn")
    for dim in (64, 128, 256):
        for pages in kinds:
            yield Case(dim, pages)
            if quick:
                continue
            for spec in (PLAIN, RICH):
                yield Case(dim, pages, T=2, spec=spec)
                yield Case(dim, pages, T=3, spec=spec)
                yield Case(dim, pages, T=8, spec=spec)
                yield Case(dim, pages, T=3, group=24, page_size=256, spec=spec)
            if pages != "bfloat16":
                yield Case(dim, pages, per_page=True, spec=RICH)
                for page_size in (8, 16, 32):
                    yield Case(dim, pages, T=8, per_page=True, page_size=page_size, spec=RICH)
        if quick:
            continue
        yield Case(dim, "float16", dtype="float16", T=4, spec=RICH)
        yield Case(dim, "int8", dtype="float16", T=4, spec=RICH)
        yield Case(dim, "float8_e4m3fn", dtype="float16", T=4, spec=RICH)
        for page_size in (8, 16, 32, 128):
            yield Case(dim, "bfloat16", page_size=page_size)
        yield Case(dim, "bfloat16", T=8, page_size=8, spec=RICH)
        yield Case(dim, "int8", page_size=8, per_page=True)
    if not quick:
        for dim, value_dim in ((64, 128), (128, 64), (128, 256), (256, 128)):
            yield Case(dim, "bfloat16", value_dim=value_dim, spec=RICH)
            yield Case(dim, "int8", value_dim=value_dim, T=8, spec=RICH)


def arguments(case: Case) -> tuple[jax.ShapeDtypeStruct, Pages]:
    rows, kv_heads, tokens = 8, 4, 32768
    H, max_pages = kv_heads * case.group, tokens // case.page_size
    num_pages = rows * max_pages
    q = jax.ShapeDtypeStruct((rows, case.T, H, case.dim), case.dtype)
    shape = (num_pages, case.page_size, kv_heads)
    k = jax.ShapeDtypeStruct((*shape, case.dim), case.pages)
    v = jax.ShapeDtypeStruct((*shape, case.value_dim or case.dim), case.pages)
    scales = None
    if np.dtype(k.dtype).itemsize == 1:
        of = (num_pages, kv_heads) if case.per_page else (kv_heads,)
        scales = jax.ShapeDtypeStruct(of, "float32")
    tables = jax.ShapeDtypeStruct((rows, max_pages), "int32")
    lengths = jax.ShapeDtypeStruct((rows,), "int32")
    return q, Pages(k, v, tables, lengths, scales, scales)  # pyright: ignore[reportArgumentType]


def compile_case(case: Case, folder: Path) -> dict:
    described = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H200)
    sharding = NamedSharding(Mesh(np.array(described.devices), ("x",)), P())
    # Pallas asks this mesh which GPU it is traced for.
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    q, pages = arguments(case)
    dump = folder / "dump"
    began = time.perf_counter()
    with (
        captured_stdout(dump),
        jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)),
    ):
        fn = jax.jit(
            lambda q, pages: hopper.attend(q, pages, case.spec, None), in_shardings=sharding
        )
        compiled = fn.lower(q, pages).compile()
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    if memory is None:
        raise RuntimeError(f"{case.name}: the compiler reports no memory")
    text = dump.read_text(encoding="utf-8", errors="replace").replace("\0", "")
    shared = [int(size) for size in re.findall(r"smem_scratch_bytes=(\d+)", text)]
    modules = split_ptx(text)
    if len(shared) != 1 or set(modules) != {KERNEL}:
        raise RuntimeError(f"{case.name}: the compiler dumped {sorted(modules)}, {len(shared)}")
    used = assemble(modules[KERNEL], folder)
    plan = make_plan(q, pages, case.spec, None)  # pyright: ignore[reportArgumentType]
    by_memory = SHARED_BYTES_OF_MULTIPROCESSOR // (shared[0] + 1024)
    by_registers = 65536 // (128 * -(-used["registers"] // 8) * 8)
    return {
        "case": case.name,
        "columns": plan.columns,
        "chunks": plan.chunks,
        "stages": plan.stages,
        "splits": plan.splits,
        "shared_bytes": shared[0],
        **used,
        "blocks_per_multiprocessor": min(by_memory, by_registers),
        "blocks_counted_on": blocks_per_multiprocessor(
            *(plan.columns, plan.D, plan.E, plan.S, plan.page_dtype),
            (plan.k_scales, plan.v_scales),
        ),
        "temporaries_mib": round(memory.temp_size_in_bytes / 2**20, 1),
        "compile_s": round(seconds, 1),
    }


def assemble(ptx: str, folder: Path) -> dict:
    """What ptxas says of the kernel, compiled whole for sm_90a."""
    source = folder / "kernel.ptx"
    source.write_text(ptx + "\n", encoding="utf-8")
    ptxas = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "ptxas"
    command = [ptxas, "-v", "-O3", "-arch=sm_90a", source, "-o", folder / "kernel.cubin"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    words = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"ptxas refused the kernel: {words[:2000]}")
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", words)
    used = re.search(r"Used (\d+) registers", words)
    if spills is None or used is None:
        raise RuntimeError(f"ptxas said nothing of registers: {words[:2000]}")
    return {
        "registers": int(used[1]),
        "spill_stores_bytes": int(spills[1]),
        "spill_loads_bytes": int(spills[2]),
        "wgmma": ptx.count("wgmma.mma_async"),
        "serialized": [x.strip() for x in words.splitlines() if "serialized" in x],
    }


def judge(rows: list[dict]) -> list[str]:
    """What is wrong with the results, in words."""
    wrong = []
    for row in rows:
        if row["serialized"]:
            wrong.append(f"{row['case']}: {row['serialized'][0]}")
        if not row["wgmma"]:
            wrong.append(f"{row['case']}: no wgmma at all")
        if row["spill_stores_bytes"] or row["spill_loads_bytes"]:
            wrong.append(f"{row['case']}: spills {row['spill_stores_bytes']} bytes")
        if row["shared_bytes"] > SHARED_BYTES_ALLOWED:
            wrong.append(f"{row['case']}: {row['shared_bytes']} bytes of shared memory")
        if row["blocks_per_multiprocessor"] < row["blocks_counted_on"]:
            wrong.append(
                f"{row['case']}: {row['blocks_per_multiprocessor']} thread blocks share a "
                f"multiprocessor, the plan counts on {row['blocks_counted_on']}"
            )
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/aot hopper-decode", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one variant a page dtype")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--out", type=Path, help=f"the JSON (kept ones are in {RESULTS.name}/)")
    options = parser.parse_args()
    rows, refused = [], []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(options.quick):
            if options.only not in case.name:
                continue
            try:
                row = compile_case(case, Path(folder))
            except (jax.errors.JaxRuntimeError, ValueError) as error:
                refused.append({"case": case.name, "error": str(error)[:2000]})
                print(f"REFUSED {case.name}: {str(error)[:500]}", flush=True)
                continue
            rows.append(row)
            print(
                f"{row['registers']:3} registers, spills {row['spill_stores_bytes']}, "
                f"shared {row['shared_bytes']:7,} bytes, {row['stages']} stages, "
                f"{row['blocks_per_multiprocessor']} blocks a multiprocessor, "
                f"{'SERIALIZED' if row['serialized'] else 'none serialized'}: {row['case']}",
                flush=True,
            )
    if not rows and not refused:
        print(f"aot: no case's name holds {options.only!r}", file=sys.stderr)
        return 2
    wrong = judge(rows) + [f"{entry['case']}: refused by the compiler" for entry in refused]
    if options.out is not None:
        packages = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cuda-nvcc")
        report = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "versions": {n: importlib.metadata.version(n) for n in packages},
            "target": "sm_90a (NVIDIA H200)",
            "machine": f"{platform.system()} {platform.machine()}, no GPU: compiled, not run",
            "quick": options.quick,
            "wrong": wrong,
            "refused": refused,
            "compiled": rows,
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for line in wrong:
        print(f"WRONG {line}", file=sys.stderr)
    print(f"{len(rows)} kernels compiled, {len(refused)} refused, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
