"""Compiles ring attention for 8 H200s that are described, not there, and reads its schedule.

As `tools/aot ring`, with the compiler of XLA's GPU backend and the Hopper kernels: whether a kernel
stands between the start and the end of every permute. What XLA schedules so runs on another stream
than the kernels; that NCCL and a kernel do share a chip is not seen here.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import hopper
import jax
import numpy as np
import ring
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from memtrain_kernels import compiling_for


CHIPS = 8
# By default XLA holds one in flight, and the backward pass has two a hop: keys, and what they
# have collected. One of the two then runs alone.
IN_FLIGHT = "xla_gpu_experimental_parallel_collective_overlap_limit"


def cases(quick: bool) -> Iterator[ring.Case]:
    target = f"h200x{CHIPS}"
    yield ring.Case(target, in_flight=2)
    if not quick:
        yield ring.Case(target, 8, in_flight=2)
        yield ring.Case(target, layout="contiguous", window=ring.WINDOW, in_flight=2)
        yield ring.Case(target, asserted=False)


def compile_hopper(case: ring.Case) -> dict:
    described = topologies.get_topology_desc(
        platform="cuda", topology=f"1x1x{CHIPS}", target_config=hopper.H200
    )
    mesh = Mesh(np.array(described.devices), ("context",))
    # Pallas asks this mesh which GPU it is traced for.
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    abstract = AbstractMesh((CHIPS,), ("context",), (AxisType.Auto,), abstract_device=device)
    fn, arguments = ring.program(case, mesh, "hopper", is_ambient=True)
    began = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        hopper.captured_stdout(Path(folder) / "dump"),
        jax.sharding.use_abstract_mesh(abstract),
        compiling_for("gpu", "NVIDIA H200"),
    ):
        lowered = jax.jit(fn).trace(*arguments).lower(lowering_platforms=("cuda",))
        flags = {} if case.in_flight is None else {IN_FLIGHT: case.in_flight}
        compiled = lowered.compile(compiler_options=flags)
    return ring.row_of(case, mesh, compiled, time.perf_counter() - began)


def main() -> int:
    options = ring.parse("tools/aot ring-hopper", __doc__)
    rows, refused = ring.report(options, compile_hopper, list(cases(options.quick)))
    packages = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cuda-nvcc")
    return ring.finish(options, rows, refused, ring.judge(rows), packages)


if __name__ == "__main__":
    sys.exit(main())
