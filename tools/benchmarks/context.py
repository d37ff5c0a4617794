"""A ring beside one device: CPU time of the same work, and memory per device as devices are added.

Time is CPU time of the process, forward and backward: simulated devices share the cores, so that
what they wait for each other is no loss here. Memory is what the compiler sets aside on each device
for the whole train step, at a fixed number of tokens on each.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from common import write


DEVICES = 8


@dataclass(frozen=True)
class Options:
    tokens: int = 16_384
    """Of the sequence whose ring is timed."""
    heads: int = 2
    head_dim: int = 64
    rounds: int = 5
    tokens_per_device: int = 131_072
    """Of the train step whose memory is looked at."""
    recipe: str = "experiments/million_tokens.py:ring"
    part: str | None = None
    """Of the program itself: one of its parts, in a process of its own."""
    out: Path | None = None


def main() -> None:
    options = tyro.cli(Options)
    if options.part is not None:
        print(memory_of(options, int(options.part)))
        return
    from memtrain import runtime

    runtime.prepare(DEVICES)
    from memtrain.train.records import versions

    times = cpu_times(options)
    one = times.pop("one device")
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds, one, strict=True))
        for name, seconds in times.items()
    }
    print(f"causal attention, {options.tokens:,} tokens, {options.heads} x {options.head_dim}")
    print(f"one device            {statistics.median(one):.2f} s of CPU, forward and backward")
    for name, ratio in ratios.items():
        print(f"{name:<21} {ratio:.3f} x")
    memory = {}
    for devices in (1, 2, 4, 8):
        argv = [sys.executable, __file__, "--part", str(devices), "--recipe", options.recipe]
        argv += ["--tokens-per-device", str(options.tokens_per_device)]
        done = subprocess.run(argv, check=True, capture_output=True, text=True)
        memory[devices] = int(done.stdout.split()[-1])
        print(
            f"{devices} devices, {devices * options.tokens_per_device:,} tokens: "
            f"{memory[devices] / 2**20:,.0f} MiB on each",
            flush=True,
        )
    results = {
        "tokens": options.tokens,
        "heads": options.heads,
        "head_dim": options.head_dim,
        "cpu_seconds": {"one device": one, **times},
        "cpu_ratio": ratios,
        "recipe": options.recipe,
        "tokens_per_device": options.tokens_per_device,
        "temporary_bytes_per_device": memory,
    }
    write(options.out, "context", results, versions())


def cpu_times(options: Options) -> dict[str, list[float]]:
    """CPU seconds of one forward and backward pass, each way in turn."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, PartitionSpec

    from memtrain_kernels import AttentionSpec, attention, context_attention

    rng = np.random.default_rng(0)
    shape = (1, options.tokens, options.heads, options.head_dim)
    q, k, v, d = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(4))
    spec = AttentionSpec(ordered=True)
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("context",))
    rows = PartitionSpec(None, "context")

    def sharded(layout: Any) -> Callable:
        return jax.shard_map(
            lambda q, k, v: context_attention(q, k, v, axis="context", layout=layout, spec=spec),
            mesh=mesh,
            in_specs=rows,
            out_specs=rows,
            check_vma=False,
        )

    ways = {"one device": lambda q, k, v: attention(q, k, v, spec=spec)}
    ways |= {f"ring of {DEVICES}, {name}": sharded(name) for name in ("zigzag", "contiguous")}
    programs = {
        name: jax.jit(
            jax.grad(lambda q, k, v, d, way=way: jnp.sum(way(q, k, v) * d), argnums=(0, 1, 2))
        )
        for name, way in ways.items()
    }
    for program in programs.values():
        jax.block_until_ready(program(q, k, v, d))
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(options.rounds):
        for name, program in programs.items():
            begin = time.process_time()
            jax.block_until_ready(program(q, k, v, d))
            seconds[name].append(time.process_time() - begin)
    return seconds


def memory_of(options: Options, devices: int) -> int:
    """Bytes of temporaries that the compiled train step sets aside on each of the devices."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from memtrain import runtime
    from memtrain.config import override
    from memtrain.recipe import load_recipe

    changes = [f"mesh.context={devices}", f"train.seq_len={devices * options.tokens_per_device}"]
    experiment = override(load_recipe(options.recipe), changes)
    runtime.prepare(experiment.num_devices, say=lambda line: None)

    from memtrain.parallel.mesh import mesh_of
    from memtrain.train.state import Plan
    from memtrain.train.step import abstract_batch, make_train_step

    plan = Plan.of(experiment, 256, mesh_of(experiment.mesh))
    compiled = make_train_step(plan).lower(plan.abstract(), abstract_batch(plan)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    main()
