"""Experiments that are compiled here to hold the plan to, and what their compiler says."""

import dataclasses

from memtrain.config import Experiment
from memtrain.data.config import DataConfig
from memtrain.layers import (
    Attention,
    Block,
    GatedDelta,
    Mamba1,
    ModelConfig,
    MoE,
    ProductKeyMemory,
    SwiGLU,
    Window,
)
from memtrain.model.config import Block as BlockConfig
from memtrain.parallel.config import MeshConfig
from memtrain.plan.compile import Compiled, compile_train_step
from memtrain.plan.target import parse_target
from memtrain.train.config import TrainConfig


VOCAB = 4096
TABLE = ProductKeyMemory(num_slots=128**2, value_dim=256)


def experiment(
    *pattern, rows: int = 8, seq_len: int = 512, mesh: MeshConfig | None = None, **model
) -> Experiment:
    return Experiment(
        name="x",
        model=ModelConfig(**{"dim": 256, "repeats": 2, "pattern": pattern, **model}),
        train=TrainConfig(batch_size=rows, seq_len=seq_len),
        mesh=mesh or MeshConfig(),
    )


def in_segments(experiment: Experiment, count: int) -> Experiment:
    """The same on rows in document order, read in parts, with memory that is carried."""
    return dataclasses.replace(
        experiment,
        data=DataConfig(order="document"),
        train=dataclasses.replace(experiment.train, carry="tbptt", tbptt_segments=count),
    )


def compiled(experiment: Experiment) -> Compiled:
    """By the CPU's compiler, on as many simulated devices as the mesh has."""
    return compile_train_step(experiment, parse_target(f"cpux{experiment.num_devices}"), VOCAB)


DENSE = Attention(num_heads=4)
WIDE = BlockConfig(mixer=Attention(num_heads=8, num_kv_heads=4), ffn=SwiGLU(hidden=2752))
DELTA = BlockConfig(mixer=GatedDelta(num_heads=4, head_dim=64), ffn=SwiGLU(hidden=512))
MAMBA1 = BlockConfig(mixer=Mamba1(), ffn=SwiGLU(hidden=512))
NEAR = Window(128, num_heads=4)
EXPERTS = BlockConfig(mixer=NEAR, ffn=MoE(8, 2, hidden=512))
MEMORY = (Window(128, num_heads=4), Block(mixer=Attention(num_heads=4), ffn=TABLE))
LARGE_TABLE = (
    Window(128, num_heads=4),
    Block(
        mixer=Attention(num_heads=4),
        ffn=ProductKeyMemory(num_slots=1024**2, num_heads=2, top_k=8, value_dim=64),
    ),
)
