"""Eight billion parameters in 32 layers and a memory of 16.8M slots, over millions of tokens.

    memtrain plan experiments/flagship.py --target v5p:4x4x4
    memtrain plan experiments/flagship.py:four_million --target v5p:8x8x8
    memtrain plan experiments/flagship.py:sixteen_million --target v5p:8x16x16
    memtrain plan experiments/flagship.py:hopper --target h200x8

The shape is that of Llama 3 8B (arXiv 2407.21783, table 3): width 4,096, 32 query heads and 8 key
and value heads of 128, hidden layers of 14,336, a vocabulary of 128,256. Every eighth layer reads a
memory instead of its feed-forward layer: one table of 4,096^2 = 16,777,216 values of 1,024 numbers,
17 billion parameters that all four layers share (Memory Layers at Scale, arXiv 2412.09764: 4 heads,
top-k 32).

`recipe` reads rows of 1,048,576 tokens on 64 chips, `four_million` of 4,194,304 on 512,
`sixteen_million` of 16,777,216 on 2,048, and `hopper` of 1,048,576 on the eight GPUs of one
machine: one row over all of them. `tools/aot plan-table` compiles them, and
docs/results/plan-table.md is what came of it.
"""

import dataclasses

from memtrain.config import Experiment
from memtrain.description import Dtypes
from memtrain.layers import Attention, Block, ModelConfig, ProductKeyMemory, SwiGLU
from memtrain.parallel.config import MeshConfig
from memtrain.train.config import TrainConfig


MILLION = 2**20

ATTENTION = Attention(num_heads=32, num_kv_heads=8, head_dim=128, rope_theta=500_000.0)
TABLE = ProductKeyMemory(num_slots=4096**2, num_heads=4, top_k=32, key_dim=256, value_dim=1024)


def recipe() -> Experiment:
    dense = Block(mixer=ATTENTION, ffn=SwiGLU(hidden=14_336))
    return Experiment(
        name="flagship",
        model=ModelConfig(
            dim=4096,
            pattern=(*(dense,) * 7, Block(mixer=ATTENTION, ffn=TABLE)),
            repeats=4,
            vocab_size=128_256,
            tied_embeddings=False,
            remat="full",
            dtypes=Dtypes(compute="bfloat16", matmul="bfloat16", state="bfloat16"),
        ),
        train=TrainConfig(batch_size=1, seq_len=MILLION),
        mesh=MeshConfig(context=64),
    )


def four_million() -> Experiment:
    return _over(4 * MILLION, MeshConfig(context=512))


def sixteen_million() -> Experiment:
    return _over(16 * MILLION, MeshConfig(context=2048))


def hopper() -> Experiment:
    return _over(MILLION, MeshConfig(context=8))


def _over(seq_len: int, mesh: MeshConfig) -> Experiment:
    base = recipe()
    return dataclasses.replace(
        base,
        name=f"flagship-{seq_len // 1024}k-over-{mesh.context}",
        train=dataclasses.replace(base.train, seq_len=seq_len),
        mesh=mesh,
    )
