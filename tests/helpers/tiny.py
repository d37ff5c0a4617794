"""A tiny experiment on generated batches, for tests of the trainer."""

import dataclasses
from typing import Any

import numpy as np

from memtrain.config import Experiment
from memtrain.data.batch import Batch
from memtrain.layers import Attention, Block, ModelConfig, ProductKeyMemory, SwiGLU, Window
from memtrain.parallel.config import MeshConfig
from memtrain.parallel.mesh import mesh_of
from memtrain.train.config import OptimizerConfig, TrainConfig
from memtrain.train.state import Plan


VOCAB = 32
TABLE = ProductKeyMemory(num_slots=64, num_heads=2, top_k=3, key_dim=8, value_dim=16)


def experiment(*, mesh: MeshConfig | None = None, windows_only: bool = False, **train: Any):
    long = Window(6, num_heads=2) if windows_only else Attention(num_heads=2)
    return Experiment(
        name="tiny",
        model=ModelConfig(
            dim=16,
            pattern=(
                Block(mixer=Window(5, num_heads=2, sink_tokens=1), ffn=SwiGLU(hidden=32)),
                Block(mixer=long, ffn=TABLE),
            ),
            loss_chunk_tokens=24,
        ),
        train=TrainConfig(**{"batch_size": 8, "seq_len": 12, "num_steps": 20, **train}),
        optimizer=OptimizerConfig(learning_rate=1e-2, table_learning_rate=2e-2, warmup_steps=3),
        mesh=mesh or MeshConfig(),
    )


def plan_of(config: Experiment) -> Plan:
    return Plan.of(config, VOCAB, mesh_of(config.mesh))


def batch(seed: int, rows: int = 8, length: int = 12) -> Batch:
    """Packed documents of random lengths, answer-only weights here and there, a padded tail."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (rows, length)).astype(np.int32)
    starts = rng.random((rows, length)) < 0.2
    starts[:, 0] = True
    at = np.arange(length)
    begun = np.maximum.accumulate(np.where(starts, at, 0), axis=1)
    valid = at < rng.integers(length // 2, length + 1, (rows, 1))
    return Batch(
        tokens=tokens,
        targets=np.roll(tokens, -1, axis=1),
        loss_weights=(valid * rng.choice([0.0, 1.0, 1.0, 2.0], (rows, length))).astype(np.float32),
        positions=(at - begun).astype(np.int32),
        starts=starts,
        valid=valid,
    )


def with_train(config: Experiment, **changes: Any) -> Experiment:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def carried(config: Experiment) -> Experiment:
    """The same with memories that go on from step to step."""
    data = dataclasses.replace(config.data, order="document")
    train = dataclasses.replace(config.train, carry="stop")
    return dataclasses.replace(config, data=data, train=train)
