"""Rows of 1,048,576 tokens on eight devices: a laptop's CPU will do, in 16 GiB.

    memtrain train experiments/million_tokens.py
    memtrain train experiments/million_tokens.py:ring
    memtrain train experiments/million_tokens.py:short

`recipe` has windows of attention and a memory table: the devices of the context axis pass their
keys to one neighbour and no further. `ring` has convolutions, a memory table, and a layer of full
attention over all the tokens of the row, one head of 32: its keys and values travel round the
devices, and one step of it is 2 x 10^14 operations, about an hour on two CPU cores. `short` is
`ring` with rows of 8,192 tokens.

The text is the standard library's, as one document; data.path takes books. The same recipes run on
eight GPUs or a TPU slice: docs/long-context.md.
"""

import dataclasses

from memtrain.config import Experiment
from memtrain.data.config import DataConfig
from memtrain.layers import (
    Attention,
    Block,
    ModelConfig,
    ProductKeyMemory,
    ShortConv,
    SwiGLU,
    Window,
)
from memtrain.parallel.config import MeshConfig
from memtrain.train.config import OptimizerConfig, TrainConfig


LOCAL = Window(256, num_heads=1, head_dim=32, sink_tokens=4)
TABLE = ProductKeyMemory(num_slots=64**2, num_heads=1, top_k=8, key_dim=32, value_dim=32)


def recipe() -> Experiment:
    return Experiment(
        name="million-tokens",
        model=ModelConfig(
            dim=32,
            pattern=(Block(mixer=LOCAL, ffn=SwiGLU(hidden=64)), Block(mixer=LOCAL, ffn=TABLE)),
            remat="full",
        ),
        data=DataConfig(path=("stdlib",), join_documents=True, prefetch=1),
        train=TrainConfig(
            num_steps=8,
            batch_size=1,
            seq_len=1_048_576,
            checkpoint_every_steps=4,
            evaluate_every_steps=8,
            evaluate_batches=1,
            log_every_steps=1,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        mesh=MeshConfig(context=8),
    )


def ring() -> Experiment:
    base = recipe()
    mix = Block(mixer=ShortConv(4), ffn=SwiGLU(hidden=64))
    pattern = (mix, Block(mixer=Attention(num_heads=1, head_dim=32), ffn=TABLE))
    return dataclasses.replace(
        base,
        name="million-tokens-ring",
        model=dataclasses.replace(base.model, pattern=pattern, remat="none"),
        train=dataclasses.replace(base.train, num_steps=1, checkpoint_every_steps=1),
    )


def short() -> Experiment:
    base = ring()
    train = dataclasses.replace(
        base.train,
        seq_len=8192,
        num_steps=20,
        checkpoint_every_steps=10,
        evaluate_every_steps=20,
        log_every_steps=5,
    )
    return dataclasses.replace(base, name="million-tokens-short", train=train)
