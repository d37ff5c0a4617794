"""Compiles small train steps for TPU, to hold the memory estimate of `memtrain plan` to.

The flagship's kinds of layers at a quarter of its width, for one host of v5p: dense, with a
product-key memory, with windows, with parameters sharded over rows instead of tokens, and with
activations kept and heads split. tests/plan/test_tpu_memory.py compares the estimate with what the
compiler said of each, and compiles nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plan_table import versions


if TYPE_CHECKING:
    from memtrain.config import Experiment

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "plan-shapes.json"
VOCAB = 32_768


def experiment(
    name: str, *pattern: Any, rows: int = 1, seq_len: int = 65_536, mesh: Any = None, **model: Any
) -> Experiment:
    from memtrain.config import Experiment
    from memtrain.description import Dtypes
    from memtrain.layers import ModelConfig
    from memtrain.parallel.config import MeshConfig
    from memtrain.train.config import TrainConfig

    described: dict[str, Any] = {
        "dim": 1024,
        "repeats": 4,
        "pattern": pattern,
        "vocab_size": VOCAB,
        "tied_embeddings": False,
        "remat": "full",
        "dtypes": Dtypes(compute="bfloat16", matmul="bfloat16", state="bfloat16"),
    }
    return Experiment(
        name=name,
        model=ModelConfig(**{**described, **model}),
        train=TrainConfig(batch_size=rows, seq_len=seq_len),
        mesh=mesh or MeshConfig(context=4),
    )


def blocks() -> dict[str, Any]:
    from memtrain.layers import Attention, Block, ProductKeyMemory, SwiGLU, Window

    heads: dict[str, Any] = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128}
    wide = SwiGLU(hidden=3584)
    table = ProductKeyMemory(num_slots=1024**2, num_heads=4, top_k=32, key_dim=256, value_dim=512)
    return {
        "dense": Block(mixer=Attention(**heads), ffn=wide),
        "table": Block(mixer=Attention(**heads), ffn=table),
        "window": Block(mixer=Window(4096, **heads), ffn=wide),
    }


def dense() -> Experiment:
    return experiment("dense", blocks()["dense"])


def table() -> Experiment:
    return experiment("table", blocks()["dense"], blocks()["table"])


def window() -> Experiment:
    return experiment("window", blocks()["window"], blocks()["dense"])


def sharded() -> Experiment:
    from memtrain.parallel.config import MeshConfig

    mesh = MeshConfig(fsdp=4)
    return experiment("sharded", blocks()["dense"], rows=8, seq_len=8192, mesh=mesh)


def kept() -> Experiment:
    from memtrain.parallel.config import MeshConfig

    mesh = MeshConfig(fsdp=2, tensor=2)
    return experiment("kept", blocks()["dense"], rows=4, seq_len=8192, mesh=mesh, remat="none")


@dataclasses.dataclass(frozen=True)
class Shape:
    name: str
    build: Callable[[], Experiment]
    target: str = "v5p:2x2x1"


SHAPES = tuple(Shape(build.__name__, build) for build in (dense, table, window, sharded, kept))


def compile_shape(shape: Shape) -> dict[str, Any]:
    """What the compiler says, in this process."""
    from memtrain.plan.compile import compile_train_step, prepare_compiler
    from memtrain.plan.target import parse_target

    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    target = parse_target(shape.target)
    prepare_compiler(target)
    found = compile_train_step(shape.build(), target, VOCAB)
    figures = dataclasses.asdict(found)
    del figures["overlap"]
    return {**figures, "bytes_per_device": found.total}


def run_shape(shape: Shape) -> dict[str, Any]:
    """In a process of its own, which may die."""
    began = time.perf_counter()
    command = [sys.executable, __file__, "--shape", shape.name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    found: dict[str, Any] = {"refused": f"the compiler's process ended with {done.returncode}"}
    if done.returncode == 0:
        found = {"compiled": json.loads(done.stdout.splitlines()[-1])}
    return {
        "name": shape.name,
        "target": shape.target,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions(),
        "wall_s": round(time.perf_counter() - began, 1),
        **found,
    }


def write(rows: list[dict[str, Any]], out: Path) -> None:
    """In the order of SHAPES."""
    order = [shape.name for shape in SHAPES]
    content = {
        "machine": f"{platform.system()} {platform.machine()}: compiled, not run",
        "rows": sorted(rows, key=lambda row: order.index(row["name"])),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read(out: Path) -> list[dict[str, Any]]:
    """Rows kept before that are still asked for."""
    if not out.exists():
        return []
    asked = {shape.name: shape.target for shape in SHAPES}
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if asked.get(row["name"]) == row["target"]]


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/aot plan-shapes", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first")
    parser.add_argument("--only", default="", help="shapes whose name holds this")
    parser.add_argument("--out", type=Path, help=f"the JSON (the kept one is {RESULTS.name})")
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.shape is not None:
        shape = next(shape for shape in SHAPES if shape.name == options.shape)
        print(json.dumps(compile_shape(shape)))
        return 0
    todo = [shape for shape in SHAPES if options.only in shape.name]
    if not todo:
        print(f"aot: no shape's name holds {options.only!r}", file=sys.stderr)
        return 2
    refused = 0
    for shape in todo[:1] if options.quick else todo:
        print(f"aot: {shape.name} for {shape.target}", file=sys.stderr, flush=True)
        row = run_shape(shape)
        refused += "refused" in row
        said = row.get("refused") or f"{row['compiled']['bytes_per_device'] / 2**20:,.0f} MiB"
        print(f"{shape.name:10} {said}, {row['wall_s']:,.0f} s", flush=True)
        if options.out is not None:
            others = [other for other in read(options.out) if other["name"] != shape.name]
            write([*others, row], options.out)
    return 1 if refused else 0


# Here is no memtrain installed, only what it needs.
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

if __name__ == "__main__":
    sys.exit(main())
