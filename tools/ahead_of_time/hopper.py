"""Compiles the Hopper attention kernels for an H200 that is described, not there.

The real compiler of XLA's GPU backend takes an abstract H200 and abstract arguments, Mosaic GPU
included; a kernel that does not fit shared memory is refused. The kernels' PTX is then assembled
once more by ptxas on its own and judged by that: without a chip XLA compiles it relocatable, where
ptxas ignores setmaxnreg and leaves every thread 168 registers (those spills are noted beside). Of
each kernel: registers, spills, shared memory, and whether ptxas serializes wgmma.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["MOSAIC_GPU_DUMP_PTX"] = "1"
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
os.environ["MOSAIC_GPU_DUMP_RESOURCES"] = "1"
sys.path.append(str(Path(__file__).parents[2] / "kernels"))
# A cached program would dump nothing.
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from memtrain_kernels.attention import AttentionSpec, hopper


RESULTS = Path(__file__).parent / "results"
KERNELS = ("attention_forward", "attention_dq", "attention_dkv")
SHARED_BYTES_ALLOWED = 232448
# What the driver reports of an H200, as far as XLA asks for it.
H200 = """gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""


@dataclass(frozen=True)
class Case:
    """One call to compile, forward and backward: rows of `tokens` on 8 heads of head_dim.

    documents: positions and segments are given as data. chips: how many the rows are split over.
    """

    name: str
    spec: AttentionSpec
    head_dim: int
    tokens: int = 4096
    kv_heads: int = 2
    dtype: str = "bfloat16"
    documents: bool = False
    rows: int = 2
    chips: int = 1


def cases(quick: bool) -> Iterator[Case]:
    plain = AttentionSpec()
    rich = AttentionSpec(window=1024, sink_tokens=4, soft_cap=30.0)
    for head_dim in (64, 128, 256):
        yield Case(f"head_dim {head_dim}, causal", plain, head_dim)
        yield Case(
            f"head_dim {head_dim}, documents, window, sinks, soft cap",
            rich,
            head_dim,
            documents=True,
        )
        if quick:
            continue
        window = AttentionSpec(window=1024, sink_tokens=4, prefix=7)
        yield Case(
            f"head_dim {head_dim}, documents, window, sinks, prefix",
            window,
            head_dim,
            documents=True,
        )
        both = AttentionSpec(causal=False, window=(512, 256))
        yield Case(
            f"head_dim {head_dim}, two-sided window, float16", both, head_dim, dtype="float16"
        )
        everything = AttentionSpec(causal=False, soft_cap=30.0)
        yield Case(
            f"head_dim {head_dim}, everything, soft cap, ragged, one key head",
            everything,
            head_dim,
            tokens=4001,
            kv_heads=1,
        )
    if not quick:
        yield Case("1M tokens, causal", plain, 128, tokens=2**20, documents=True, rows=1)
        yield Case("8 chips, shard_map", plain, 128, documents=True, rows=8, chips=8)


def function(case: Case) -> tuple[Callable, list[jax.ShapeDtypeStruct]]:
    """Output, log-sum-exp and all gradients, and the abstract arguments."""

    def abstract(*shape: int, dtype: str = case.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((case.rows, case.tokens, *shape), dtype)

    q, k = abstract(8, case.head_dim), abstract(case.kv_heads, case.head_dim)
    tokens = [abstract(dtype="int32")] * 2 if case.documents else []

    def run(q, k, v, do, dlse, *tokens):
        pos, seg = tokens if tokens else (None, None)

        def attend(q, k, v):
            return hopper.attend(q, k, v, pos, pos, seg, seg, case.spec)

        results, pullback = jax.vjp(attend, q, k, v)
        return results, pullback((do, dlse))

    do, dlse = abstract(8, case.head_dim, dtype="float32"), abstract(8, dtype="float32")
    over_chips = jax.shard_map(run, in_specs=P("x"), out_specs=P("x"))
    return run if case.chips == 1 else over_chips, [q, k, k, do, dlse, *tokens]


@contextlib.contextmanager
def captured_stdout(path: Path) -> Iterator[None]:
    """Whatever the process prints goes into a file: the compiler dumps to standard output."""
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    libc.fflush(None)
    saved = os.dup(1)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            libc.fflush(None)
            os.dup2(saved, 1)
            os.close(saved)


def compile_case(case: Case, folder: Path) -> list[dict]:
    described = topologies.get_topology_desc(
        platform="cuda", topology=f"1x1x{case.chips}", target_config=H200
    )
    sharding = NamedSharding(Mesh(np.array(described.devices), ("x",)), P("x"))
    # Pallas asks this mesh which GPU it is traced for.
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    mesh = AbstractMesh((case.chips,), ("x",), (AxisType.Auto,), abstract_device=device)
    dump = folder / "dump"
    began = time.perf_counter()
    with (
        captured_stdout(dump),
        jax.sharding.use_abstract_mesh(mesh),
    ):
        fn, arguments = function(case)
        compiled = jax.jit(fn, in_shardings=sharding).lower(*arguments).compile()
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    if memory is None:
        raise RuntimeError(f"{case.name}: the compiler reports no memory")
    text = dump.read_text(encoding="utf-8", errors="replace").replace("\0", "")
    # In the order of lowering, which is that of the calls.
    shared = [int(size) for size in re.findall(r"smem_scratch_bytes=(\d+)", text)]
    modules = split_ptx(text)
    relocatable = {
        name: int(size)
        for name, size in re.findall(
            r"properties for (\w+)_mosaic_gpu_kernel\n.*?(\d+) bytes spill stores", text
        )
    }
    if len(shared) != len(KERNELS) or not set(modules) == set(relocatable) == set(KERNELS):
        raise RuntimeError(f"{case.name}: the compiler dumped {sorted(modules)}, {len(shared)}")
    return [
        {
            "case": case.name,
            "kernel": kernel,
            "head_dim": case.head_dim,
            "dtype": case.dtype,
            "shared_bytes": size,
            **assemble(modules[kernel], folder),
            "spill_stores_bytes_relocatable": relocatable[kernel],
            "temporaries_mib": round(memory.temp_size_in_bytes / 2**20, 1),
            "compile_s": round(seconds, 1),
        }
        for kernel, size in zip(KERNELS, shared, strict=True)
    ]


def split_ptx(text: str) -> dict[str, str]:
    """PTX modules by the name of their kernel."""
    modules = {}
    for part in re.split(r"(?=^//\n// Generated by LLVM NVPTX)", text, flags=re.MULTILINE)[1:]:
        entry = re.search(r"\.entry (\w+?)_mosaic_gpu_kernel\(", part)
        if entry is not None:
            # Line information refers to files by tables that the dump cuts off.
            lines = part[: part.rindex("\n}") + 3].splitlines()
            modules[entry[1]] = "\n".join(x for x in lines if not x.lstrip().startswith(".loc"))
    return modules


def assemble(ptx: str, folder: Path) -> dict:
    """What ptxas says of one kernel, compiled whole for sm_90a."""
    source = folder / "kernel.ptx"
    source.write_text(ptx + "\n", encoding="utf-8")
    ptxas = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "ptxas"
    command = [ptxas, "-v", "-O3", "-arch=sm_90a", source, "-o", folder / "kernel.cubin"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    words = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"ptxas refused a kernel: {words[:2000]}")
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", words)
    used = re.search(r"Used (\d+) registers", words)
    if spills is None or used is None:
        raise RuntimeError(f"ptxas said nothing of registers: {words[:2000]}")
    limits = [int(n) for n in re.findall(r"setmaxnreg\.inc\.sync\.aligned\.u32 (\d+)", ptx)]
    return {
        "registers_at_launch": int(used[1]),
        "registers_computing": max(limits),
        "spill_stores_bytes": int(spills[1]),
        "spill_loads_bytes": int(spills[2]),
        "wgmma": ptx.count("wgmma.mma_async"),
        "serialized": [x.strip() for x in words.splitlines() if "serialized" in x],
    }


def judge(rows: list[dict]) -> list[str]:
    """What is wrong with the results, in words."""
    wrong = []
    for row in rows:
        name = f"{row['case']}, {row['kernel']}"
        if row["serialized"]:
            wrong.append(f"{name}: {row['serialized'][0]}")
        if row["spill_stores_bytes"] or row["spill_loads_bytes"]:
            wrong.append(f"{name}: spills {row['spill_stores_bytes']} bytes")
        if row["shared_bytes"] > SHARED_BYTES_ALLOWED:
            wrong.append(f"{name}: {row['shared_bytes']} bytes of shared memory")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/aot hopper", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two masks a head_dim")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--out", type=Path, help=f"the JSON (kept ones are in {RESULTS.name}/)")
    options = parser.parse_args()
    rows, refused = [], []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(options.quick):
            if options.only not in case.name:
                continue
            try:
                compiled = compile_case(case, Path(folder))
            except (jax.errors.JaxRuntimeError, ValueError) as error:
                refused.append({"case": case.name, "error": str(error)[:2000]})
                print(f"REFUSED {case.name}: {str(error)[:500]}", flush=True)
                continue
            print(f"{case.name}: {compiled[0]['compile_s']} s", flush=True)
            for row in compiled:
                rows.append(row)
                print(
                    f"  {row['kernel']:18} shared {row['shared_bytes']:7,} bytes, "
                    f"{row['registers_computing']} registers, "
                    f"spills {row['spill_stores_bytes']}, {row['wgmma']} wgmma, "
                    f"{'SERIALIZED' if row['serialized'] else 'none serialized'}",
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
