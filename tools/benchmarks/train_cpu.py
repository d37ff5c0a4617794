"""Training speed on CPU beside PyTorch: the same shape, the same run, interleaved.

d=256, 4 layers, 4 heads, T=512, batch 16 unless given. The ratio is what counts: above 1, memtrain
is the faster one.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from common import interleaved, median_ratio, write


@dataclass(frozen=True)
class Options:
    dim: int = 256
    depth: int = 4
    heads: int = 4
    seq_len: int = 512
    batch_size: int = 16
    hidden: int = 704
    rounds: int = 7
    compile: bool = False
    """Also time torch.compile (needs a C++ compiler)."""
    bfloat16: bool = True
    """Also time bf16: our bf16 operands with fp32 results, PyTorch's bf16 autocast."""
    out: Path | None = None


def our_step(options: Options, batch, matmul: str):
    """A function of no arguments that does one training step and waits for it."""
    import jax

    from memtrain.config import Experiment
    from memtrain.description import Dtypes
    from memtrain.layers import Attention, Block, ModelConfig, SwiGLU
    from memtrain.parallel.config import MeshConfig
    from memtrain.parallel.mesh import mesh_of
    from memtrain.train.config import TrainConfig
    from memtrain.train.state import Plan
    from memtrain.train.step import make_train_step

    block = Block(mixer=Attention(num_heads=options.heads), ffn=SwiGLU(hidden=options.hidden))
    experiment = Experiment(
        name="train-cpu",
        model=ModelConfig(
            dim=options.dim,
            pattern=(block,),
            repeats=options.depth,
            dtypes=Dtypes(matmul=matmul),  # type: ignore[arg-type]
        ),
        train=TrainConfig(batch_size=options.batch_size, seq_len=options.seq_len),
    )
    plan = Plan.of(experiment, 256, mesh_of(MeshConfig()))
    train_step = make_train_step(plan)
    state = plan.init()
    batch = jax.device_put(batch)

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, batch)
        return float(metrics["train/loss"])

    return step


def main() -> None:
    options = tyro.cli(Options)
    from memtrain.data.batch import Batch
    from memtrain.runtime import prepare

    prepare()  # as every command does; what it sets for the allocator serves PyTorch too
    B, T = options.batch_size, options.seq_len
    text = Path(np.__file__).with_name("matlib.py").read_bytes() * 100
    rows = np.frombuffer(text[: B * (T + 1)], np.uint8).reshape(B, T + 1).astype(np.int32)
    tokens, targets = rows[:, :-1], rows[:, 1:]
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    batch = Batch(
        tokens=tokens,
        targets=targets,
        loss_weights=np.ones((B, T), np.float32),
        positions=positions,
        starts=positions == 0,
        valid=np.ones((B, T), bool),
    )
    candidates = {"memtrain fp32": our_step(options, batch, "float32")}
    if options.bfloat16:
        candidates["memtrain bf16"] = our_step(options, batch, "bfloat16")
    from memtrain.train.records import versions

    found = versions()
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("PyTorch is not installed here: memtrain alone is timed")
    else:
        from torch_model import make_step

        found["torch"] = torch.__version__
        shape = {
            "vocab_size": 256,
            "dim": options.dim,
            "depth": options.depth,
            "num_heads": options.heads,
            "hidden": options.hidden,
            "T": T,
        }
        kinds = [("fp32", False, False)]
        kinds += [("bf16", True, False)] if options.bfloat16 else []
        if options.compile:
            kinds += [(f"{kind} compiled", cast, True) for kind, cast, _ in kinds]
        for kind, cast, compiled in kinds:
            candidates[f"torch {kind}"] = make_step(
                shape, tokens.copy(), targets.copy(), autocast=cast, compile_model=compiled
            )
    seconds = interleaved(candidates, rounds=options.rounds)
    rates = {name: B * T / statistics.median(s) for name, s in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:<24} {rate:>9,.0f} tokens/s   {1e3 * B * T / rate:8.1f} ms a step")
    ratios = {
        f"{ours} / {theirs}": median_ratio(seconds, ours, theirs)
        for ours in candidates
        for theirs in candidates
        if ours.startswith("memtrain") and theirs.startswith("torch")
    }
    for name, ratio in ratios.items():
        print(f"{name:<42} {ratio:.2f}")
    write(
        options.out,
        "train-cpu",
        {"tokens_per_second": rates, "ratios": ratios, "seconds": seconds},
        found,
    )


if __name__ == "__main__":
    main()
