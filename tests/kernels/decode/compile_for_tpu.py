"""Compiles the TPU kernel with the real compiler for chips that are not here; prints JSON lines.

Run by test_ahead_of_time.py in an environment that has libtpu, with memtrain_kernels on its path.
"""

from __future__ import annotations

import json
import os
import re
import time
from typing import Any


# libtpu asks the network and the host about TPUs unless it is told, and wants no second process.
os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5p-8",
    TPU_STDERR_LOG_LEVEL="3",
    TPU_MIN_LOG_LEVEL="3",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)

import jax
import numpy as np
import tpu_cases
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memtrain_kernels import compiling_for
from memtrain_kernels.decode import paged_attention, tpu


CHIPS = {
    "v5e": ("v5e:2x2", "TPU v5 lite"),
    "v5p": ("v5p:2x2x1", "TPU v5p"),
    "v6e": ("v6e:2x2", "TPU v6 lite"),
}
CASES = tpu_cases.SERVED | {
    f"{pages}, dim {dim}": {"pages": pages, "D": dim, "E": dim, "H": 32, "S": 64}
    for pages in ("bfloat16", "int8", "float8_e4m3fn")
    for dim in (64, 128, 256)
}
CASES["many rows, many heads"] = {"B": 300, "K": 128, "H": 128, "M": 1024}


def compile_case(change: dict[str, Any], chip: str) -> dict[str, Any]:
    """Seconds, temporaries, and how many copies of a whole pool the program makes."""
    topology, kind = CHIPS[chip]
    case = tpu_cases.SHAPE | change
    # An odd number that no other dim has: it tells pools from other arrays in the program's text.
    pages = 2**30 // (case["S"] * case["K"] * (case["D"] + case["E"]) * 4) | 1
    arrays, spec = tpu_cases.shapes(change, pages)
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    everywhere = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())

    def placed(x: Any) -> Any:
        sharding: Any = everywhere
        if len(x.shape) == 4 and x.shape[0] == pages and x.shape[3] < 128:
            order = tpu.page_layout(x.shape[2], x.dtype)
            sharding = Format(Layout(major_to_minor=order), everywhere)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def call(q, k, v, tables, lengths, k_scales, v_scales):
        scales: dict[str, Any] = {"k_scales": k_scales, "v_scales": v_scales}
        return paged_attention(q, k, v, tables, lengths, spec=spec, backend="tpu", **scales)

    began = time.perf_counter()
    with compiling_for("tpu", kind):
        traced = jax.jit(call).trace(*jax.tree.map(placed, arrays))
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    moved = re.findall(
        rf"= \w+\[{pages},\S+ (?!parameter|bitcast)[\w-]+\(", compiled.as_text() or ""
    )
    memory = compiled.memory_analysis()
    assert memory is not None
    return {
        "seconds": round(time.perf_counter() - began, 2),
        "temporary_bytes": memory.temp_size_in_bytes,
        "pool_copies": len(moved),
        "pool_bytes": sum(x.size * x.dtype.itemsize for x in arrays[1:3]),
    }


if __name__ == "__main__":
    for name, change in CASES.items():
        for chip in CHIPS:
            try:
                found = compile_case(change, chip)
            except Exception as error:
                found = {"error": re.sub(r"\s+", " ", str(error))[:400]}
            print(json.dumps({"case": name, "chip": chip} | found), flush=True)
