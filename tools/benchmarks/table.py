"""A train step with a large memory table beside one with a small table, on the same tokens.

A step reads as many rows of either. Rows of the large one lie far apart, more of them are touched,
and keys are more; the table, its moments and its gradient are 256 times as many bytes. Beside
them: the same tables under dense Adam, and how much of the small step is the memory's.
"""

from __future__ import annotations

import gc
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from common import interleaved, median_ratio, write

from memtrain.config import Experiment
from memtrain.data.batch import Batch
from memtrain.layers import Block, ModelConfig, ProductKeyMemory, SwiGLU, Window
from memtrain.parallel.config import MeshConfig
from memtrain.parallel.mesh import mesh_of
from memtrain.train.config import OptimizerConfig, TrainConfig
from memtrain.train.records import versions
from memtrain.train.state import Plan
from memtrain.train.step import make_train_step


@dataclass(frozen=True)
class Options:
    large: int = 4096**2
    """Slots of the large table."""
    small: int = 256**2
    value_dim: int = 32
    heads: int = 4
    top_k: int = 16
    key_dim: int = 32
    dim: int = 128
    """Width of the trunk."""
    batch_size: int = 8
    seq_len: int = 256
    vocab: int = 4096
    """Different tokens, drawn at random: the more, the more different rows are read."""
    rounds: int = 7
    dense: bool = True
    """Also dense Adam, which needs the memory of a gradient as large as the table."""
    out: Path | None = None


def main() -> None:
    options = tyro.cli(Options)
    lazy = {
        "large": Step(options, options.large),
        "small": Step(options, options.small),
        "none": Step(options, None),
    }
    touched = lazy["large"].untouched_stand_still()
    seconds = interleaved(lazy, rounds=options.rounds)
    of = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = median_ratio(seconds, "small", "large")
    share = 1 - of["none"] / of["small"]
    found: dict[str, Any] = {
        "large_seconds": of["large"],
        "small_seconds": of["small"],
        "large_over_small": ratio,
        "memory_share_of_small": share,
        "rows_touched": touched,
    }
    print(
        f"{options.large:,} slots {of['large']:.3f} s a step, {options.small:,} slots "
        f"{of['small']:.3f} s: {ratio:.2f} x; the memory is {share:.0%} of the smaller step"
    )
    print(f"rows not read in a step: bit for bit as before ({touched:,} rows were touched)")
    if options.dense:
        del lazy
        gc.collect()
        dense = {"large": Step(options, options.large, "dense")}
        times = statistics.median(
            interleaved(dense, rounds=max(1, options.rounds // 2), warmup=1)["large"]
        )
        found["dense_large_seconds"] = times
        print(f"{options.large:,} slots under dense Adam: {times:.3f} s a step")
    about = {"device": jax.devices()[0].device_kind, **vars(options), "out": None}
    write(options.out, "table", {**about, **found}, versions())


class Step:
    """A training step that can be called again and again, each time with the next batch."""

    def __init__(self, options: Options, slots: int | None, update: str = "lazy"):
        mixer = Window(64, num_heads=options.dim // 32)
        pattern = [Block(mixer=mixer, ffn=SwiGLU(hidden=2 * options.dim))]
        if slots is not None:
            memory = ProductKeyMemory(
                num_slots=slots,
                num_heads=options.heads,
                top_k=options.top_k,
                key_dim=options.key_dim,
                value_dim=options.value_dim,
            )
            pattern.append(Block(ffn=memory))
        experiment = Experiment(
            name="table",
            model=ModelConfig(dim=options.dim, pattern=tuple(pattern)),
            train=TrainConfig(batch_size=options.batch_size, seq_len=options.seq_len),
            optimizer=OptimizerConfig(table_update=update),  # type: ignore[arg-type]
        )
        self.plan = Plan.of(experiment, options.vocab, mesh_of(MeshConfig()))
        self.step = make_train_step(self.plan)
        self.state = self.plan.init()
        self.rng = np.random.default_rng(0)
        self.shape, self.vocab = (options.batch_size, options.seq_len), options.vocab

    def __call__(self) -> None:
        self.state, metrics = self.step(self.state, self.batch())
        jax.block_until_ready((self.state, metrics))

    def batch(self) -> Batch:
        """Random tokens, one document a row."""
        tokens = self.rng.integers(0, self.vocab, self.shape).astype(np.int32)
        positions = np.broadcast_to(np.arange(self.shape[1], dtype=np.int32), self.shape)
        return Batch(
            tokens=tokens,
            targets=np.roll(tokens, -1, axis=1),
            loss_weights=np.ones(self.shape, np.float32),
            positions=positions,
            starts=positions == 0,
            valid=np.ones(self.shape, bool),
        )

    def untouched_stand_still(self) -> int:
        """How many rows a step touched; raises AssertionError if any other moved by a bit."""
        name = "tables.memory"
        before = np.array(self.state.parameters[name])
        counts = np.array(self.state.optimizer.tables[name].updates)
        self()
        moved = np.any(np.asarray(self.state.parameters[name]) != before, axis=1)
        touched = np.asarray(self.state.optimizer.tables[name].updates) != counts
        assert touched.any() and not np.any(moved & ~touched), "a row moved that was not read"
        return int(touched.sum())


if __name__ == "__main__":
    main()
