"""Compiles the TPU attention kernels for chips and slices that are described, not there.

The real compiler (libtpu) takes abstract devices of a real slice and abstract arguments, so what it
accepts would load on such a slice. Every case is compiled forward, and forward with backward. Asked
of each: that it compiles at all (registers, on-chip and scalar memory included), how much scalar
memory the kernels' tables take, that this does not grow with the sequence, and the temporaries.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType


# libtpu asks the network and the host about TPUs unless it is told; nothing here runs on one.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.update(
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5p-8",
    TPU_STDERR_LOG_LEVEL="3",
    TPU_MIN_LOG_LEVEL="3",
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from memtrain_kernels.attention import AttentionSpec, tpu


CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# Tables of ranges: 16 KiB and the bound of the grid, whatever the length (tpu/tables.py).
SCALAR_BYTES_ALLOWED = 16 * 1024 + 4
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """One call to compile. tokens: of the whole slice, or of the one chip that it runs on.

    keys: "own" (a chip's queries against as many keys: a hop of a ring), or "all" (gathered from
    the whole slice). documents: positions and segments are given as data.
    """

    name: str
    topology: str
    tokens: int
    spec: AttentionSpec
    chips: int = 1
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    value_dim: int = 128
    dtype: str = "bfloat16"
    keys: str = "own"
    documents: bool = False


def cases(quick: bool) -> Iterator[Case]:
    masks = {
        "causal": (AttentionSpec(), False),
        "window and sinks": (AttentionSpec(window=1024, sink_tokens=4, soft_cap=30.0), False),
        "documents": (AttentionSpec(window=2048), True),
    }
    for chip, topology in CHIPS.items():
        for head_dim in (128,) if quick else (64, 128, 256):
            for mask, (spec, documents) in list(masks.items())[2 if quick else 0 :]:
                yield Case(
                    f"{chip}, head_dim {head_dim}, {mask}",
                    topology,
                    8192,
                    spec,
                    head_dim=head_dim,
                    value_dim=head_dim,
                    documents=documents,
                )
    if not quick:
        prefix = AttentionSpec(causal=False, window=(512, 256), prefix=1000)
        yield Case(
            "v5p, ragged, float32, value_dim 192, two-sided window, prefix",
            CHIPS["v5p"],
            5001,
            prefix,
            value_dim=192,
            dtype="float32",
        )
        yield Case("v6e, mask_fn, value_dim 64", CHIPS["v6e"], 8192, PARITY, value_dim=64)
        for chip in ("v5p", "v6e"):
            long = AttentionSpec(window=4096, sink_tokens=128)
            yield Case(
                f"1M on one {chip}, window",
                CHIPS[chip],
                2**20,
                long,
                heads=4,
                kv_heads=1,
                documents=True,
            )
        yield Case(
            "16M on one v5p, window",
            CHIPS["v5p"],
            2**24,
            AttentionSpec(window=4096),
            heads=1,
            kv_heads=1,
            documents=True,
        )
    for keys in ("own",) if quick else ("own", "all"):
        slices = [("1M", "v5p:4x4x4", 64), ("4M", "v6e:16x16", 256), ("16M", "v5p:8x8x16", 1024)]
        for label, topology, chips in slices:
            yield Case(
                f"{label} over {topology}, {'ring hop' if keys == 'own' else 'keys gathered'}",
                topology,
                chips * 16384,
                AttentionSpec(),
                chips=chips,
                kv_heads=1,
                keys=keys,
                documents=True,
            )


def _same_parity(q_pos, kv_pos, q_seg, kv_seg):
    return (q_pos - kv_pos) % 2 == 0


PARITY = AttentionSpec(mask_fn=_same_parity)


def functions(case: Case, mesh: Mesh) -> tuple[dict[str, Callable], list[jax.ShapeDtypeStruct]]:
    """What is compiled, and its abstract arguments."""
    along = P(None, "context")
    sharding = NamedSharding(mesh, along)

    def abstract(*shape: int, dtype: str = case.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, case.tokens, *shape), dtype, sharding=sharding)

    arguments = [
        abstract(case.heads, case.head_dim),
        abstract(case.kv_heads, case.head_dim),
        abstract(case.kv_heads, case.value_dim),
    ]
    if case.documents:
        arguments += [abstract(dtype="int32"), abstract(dtype="int32")]

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=along, out_specs=along)
    def forward(q, k, v, *tokens):
        q_pos, q_seg = tokens if tokens else (None, None)
        kv_pos, kv_seg = q_pos, q_seg
        if case.keys == "all":
            k, v, kv_pos, kv_seg = (
                jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (k, v, q_pos, q_seg)
            )
        return tpu.attend(q, k, v, q_pos, kv_pos, q_seg, kv_seg, case.spec)

    def both(q, k, v, *tokens):
        def loss(q, k, v):
            o, lse = forward(q, k, v, *tokens)
            return jnp.sum(o * o) + jnp.sum(lse)

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    return {"forward": forward, "forward and backward": both}, arguments


def scalar_bytes(hlo: str) -> dict[str, int]:
    """Bytes of scalar-memory operands of each kernel: its grid's bound and its prefetched table.

    They are the operands of rank 0 and 1; everything else that a kernel takes has blocks.
    """
    found: dict[str, int] = {}
    for line in hlo.splitlines():
        if 'custom_call_target="tpu_custom_call"' not in line:
            continue
        name = re.search(r"(attention_forward|attention_dq|attention_dkv)", line)
        operands = re.search(r"operand_layout_constraints=\{(.*?)\}, ", line)
        if name is None or operands is None:
            raise RuntimeError(f"a kernel that this tool does not know: {line[:200]}")
        scalars = re.findall(r"s32\[(\d*)\](?:\{0\})?", operands[1])
        size = 4 * sum(int(length or 1) for length in scalars)
        found[name[1]] = max(size, found.get(name[1], 0))
    return found


def refusal_of_a_big_table() -> str | None:
    """The control: what the compiler says to 2 MiB of prefetched scalars; None if it takes them.

    Its taking the cases tells that their scalar memory fits only if it refuses what does not.
    """
    mesh = mesh_of(CHIPS["v5p"], 1)
    table = jax.ShapeDtypeStruct((2**19,), "int32", sharding=NamedSharding(mesh, P()))

    def kernel(table, out):
        out[...] = jnp.full(out.shape, table[0])

    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1,),
            out_specs=pl.BlockSpec((8, 128), lambda i, table: (0, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((8, 128), "int32"),
    )
    try:
        jax.jit(call).trace(table).lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        return str(error)
    return None


def mesh_of(topology: str, chips: int | None = None) -> Mesh:
    """One axis over so many chips of a slice; over all of them unless said, and then as training
    would lay it, each chip linked to the next."""
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    if chips is not None:
        return Mesh(np.array(devices[:chips]), ("context",))
    ring = of_memtrain("parallel/torus.py").arranged((len(devices),), devices, ring=0)
    assert ring is not None, f"{topology} is a cuboid"
    return Mesh(ring, ("context",))


def of_memtrain(file: str) -> ModuleType:
    """A module from its file: here is no memtrain, only jax and the kernels."""
    path = Path(__file__).parents[2] / "memtrain" / file
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def compile_case(case: Case) -> list[dict]:
    mesh = mesh_of(case.topology, case.chips)
    rows = []
    compiled_functions, arguments = functions(case, mesh)
    for what, fn in compiled_functions.items():
        began = time.perf_counter()
        lowered = jax.jit(fn).trace(*arguments).lower(lowering_platforms=("tpu",))
        compiled = lowered.compile()
        seconds = time.perf_counter() - began
        memory, text = compiled.memory_analysis(), compiled.as_text()
        if memory is None or text is None:
            raise RuntimeError(f"{case.name}: the compiler reports no memory or no program")
        kernels = scalar_bytes(text)
        expected = 1 if what == "forward" else 3
        if len(kernels) != expected:
            raise RuntimeError(f"{case.name}: {len(kernels)} kernels {kernels}, not {expected}")
        rows.append(
            {
                "case": case.name,
                "what": what,
                "device": mesh.devices.flat[0].device_kind,
                "chips": case.chips,
                "tokens": case.tokens,
                "heads": [case.heads, case.kv_heads],
                "head_dim": [case.head_dim, case.value_dim],
                "dtype": case.dtype,
                "scalar_bytes": kernels,
                "arguments_mib": round(memory.argument_size_in_bytes / 2**20, 1),
                "temporaries_mib": round(memory.temp_size_in_bytes / 2**20, 1),
                "compile_s": round(seconds, 1),
            }
        )
    return rows


def judge(rows: list[dict]) -> list[str]:
    """What is wrong with the results, in words: scalar memory over its bound or growing."""
    wrong = [
        f"{row['case']}, {row['what']}: {kernel} takes {size} bytes of scalar memory, "
        f"{SCALAR_BYTES_ALLOWED} allowed"
        for row in rows
        for kernel, size in row["scalar_bytes"].items()
        if size > SCALAR_BYTES_ALLOWED
    ]
    for kind in ("ring hop", "keys gathered"):
        for what in ("forward", "forward and backward"):
            over = [r for r in rows if r["case"].endswith(kind) and r["what"] == what]
            if len({json.dumps(row["scalar_bytes"], sort_keys=True) for row in over}) > 1:
                sizes = {f"{row['tokens']:,}": row["scalar_bytes"] for row in over}
                wrong.append(f"{kind}, {what}: scalar memory depends on the length: {sizes}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/aot tpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one case a chip, and the ring hops")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--out", type=Path, help=f"the JSON (kept ones are in {RESULTS.name}/)")
    options = parser.parse_args()
    rows, refused = [], []
    for case in cases(options.quick):
        if options.only not in case.name:
            continue
        try:
            compiled = compile_case(case)
        except jax.errors.JaxRuntimeError as error:
            refused.append({"case": case.name, "error": str(error)[:2000]})
            print(f"REFUSED {case.name}: {str(error)[:500]}", flush=True)
            continue
        for row in compiled:
            rows.append(row)
            print(
                f"{row['case']}, {row['what']}: temporaries {row['temporaries_mib']:,.0f} MiB, "
                f"scalar bytes {max(row['scalar_bytes'].values())}, {row['compile_s']} s",
                flush=True,
            )
    if not rows and not refused:
        print(f"aot: no case's name holds {options.only!r}", file=sys.stderr)
        return 2
    control = refusal_of_a_big_table()
    wrong = judge(rows) + [f"{entry['case']}: refused by the compiler" for entry in refused]
    if control is None or "smem" not in control:
        wrong.append(f"2 MiB of scalars were not refused for their size: {control}")
    if options.out is not None:
        report = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "versions": {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "libtpu")},
            "machine": f"{platform.system()} {platform.machine()}, no TPU: compiled, not run",
            "quick": options.quick,
            "wrong": wrong,
            "refused": refused,
            "control_2_mib_of_scalars": control,
            "compiled": rows,
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for line in wrong:
        print(f"WRONG {line}", file=sys.stderr)
    print(f"{len(rows)} programs compiled, {len(refused)} refused, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
