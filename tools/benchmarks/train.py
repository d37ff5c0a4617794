"""Training speed of a recipe on the devices that are here: tokens/s, MFU, step times.

The recipe's own model, data, mesh and optimizer; nothing is written. MFU counts from the data
sheet of an accelerator, or on CPU from a matrix product measured in the same run.
"""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from common import write


@dataclass(frozen=True)
class Options:
    recipe: tyro.conf.Positional[str] = "experiments/quickstart.py"
    """path/to/file.py[:function]"""
    set: tuple[str, ...] = ()
    """Fields to change, e.g. --set mesh.fsdp=8 train.seq_len=2048."""
    steps: int = 20
    out: Path | None = None


def main() -> None:
    options = tyro.cli(Options)
    from memtrain.overrides import override
    from memtrain.recipe import load_recipe
    from memtrain.runtime import prepare

    experiment = override(load_recipe(options.recipe), options.set)
    mesh_config = experiment.mesh
    prepare(mesh_config.data * mesh_config.fsdp * mesh_config.context * mesh_config.tensor)
    import jax

    from memtrain.data.pipeline import build_pipeline
    from memtrain.model.flops import FORMULA, forward_flops
    from memtrain.parallel.mesh import mesh_of
    from memtrain.parallel.peak import peak_flops
    from memtrain.train.feed import on_devices
    from memtrain.train.records import versions
    from memtrain.train.state import Plan
    from memtrain.train.step import make_train_step

    config = experiment.train
    pipeline = build_pipeline(
        experiment.data, seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed
    )
    mesh = mesh_of(mesh_config)
    plan = Plan.of(experiment, experiment.model.vocab_size or pipeline.vocab_size, mesh)
    train_step, state = make_train_step(plan), plan.init()
    batches = on_devices(pipeline.batches(0), mesh)
    warmup, seconds = 2, []
    for batch in itertools.islice(batches, warmup + options.steps):
        start = time.perf_counter()
        state, metrics = train_step(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    first, seconds = seconds[0], seconds[warmup:]

    with jax.ensure_compile_time_eval():
        flops = forward_flops(plan.skeleton.merge(plan.skeleton.shapes), config.seq_len)  # type: ignore[arg-type]
    peak, source = peak_flops(mesh.size, experiment.model.dtypes.matmul)
    rate = config.batch_size * config.seq_len / statistics.median(seconds)
    results = {
        "recipe": options.recipe,
        "set": list(options.set),
        "device": jax.devices()[0].device_kind,
        "mesh": dict(mesh.shape),
        "tokens_per_second": rate,
        "seconds_per_step": seconds,
        "seconds_first_step": first,
        "flops_per_token": flops.training,
        "flops_formula": FORMULA,
        "peak_flops": peak,
        "peak_source": source,
        "mfu": None if peak is None else rate * flops.training / peak,
    }
    mfu = "-" if peak is None else f"{100 * results['mfu']:.1f}%"
    print(
        f"{experiment.name}: {rate:,.0f} tokens/s, {1e3 * statistics.median(seconds):.0f} ms a step"
        f" (min {1e3 * min(seconds):.0f}, max {1e3 * max(seconds):.0f}), MFU {mfu} of {source}"
    )
    write(options.out, "train", results, versions())


if __name__ == "__main__":
    main()
