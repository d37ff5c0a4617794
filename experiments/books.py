"""A model with local, long and table memory on any folder of books.

    memtrain train experiments/books.py --set data.path=path/to/books

`data.path` takes folders, globs, .txt, .gz, .xz, .jsonl and ArrayRecord files. The model is a
33M-parameter one for a GPU; `:small` is one for a laptop, and `:carried` reads every book from
beginning to end with its memory carried from step to step.
"""

import dataclasses

from memtrain.config import Experiment
from memtrain.data.config import DataConfig
from memtrain.description import Dtypes
from memtrain.layers import Attention, Block, ModelConfig, ProductKeyMemory, SwiGLU, Window
from memtrain.train.config import OptimizerConfig, TrainConfig


def recipe() -> Experiment:
    local = Block(mixer=Window(256, num_heads=8), ffn=SwiGLU())
    table = ProductKeyMemory(num_slots=256**2, num_heads=4, top_k=16, value_dim=256)
    return Experiment(
        name="books",
        model=ModelConfig(
            dim=512,
            pattern=(local, local, Block(mixer=Attention(num_heads=8), ffn=table)),
            repeats=2,
            dtypes=Dtypes(compute="bfloat16", matmul="bfloat16"),
        ),
        data=DataConfig(path=("books",)),
        train=TrainConfig(num_steps=20_000, batch_size=32, seq_len=2048),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=500, schedule="wsd"),
    )


def small() -> Experiment:
    """For a laptop: minutes, not hours."""
    local = Block(mixer=Window(64, num_heads=4), ffn=SwiGLU(hidden=512))
    table = ProductKeyMemory(num_slots=128**2, num_heads=2, top_k=8, value_dim=192)
    big = recipe()
    return dataclasses.replace(
        big,
        name="books-small",
        model=ModelConfig(
            dim=192, pattern=(local, Block(mixer=Attention(num_heads=4), ffn=table)), repeats=2
        ),
        train=TrainConfig(num_steps=1000, batch_size=16, seq_len=512),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=50),
    )


def carried() -> Experiment:
    """Document order, and the windows' memory carried over the edge of every step."""
    base = small()
    local = Block(mixer=Window(256, num_heads=4, sink_tokens=4), ffn=SwiGLU(hidden=512))
    table = ProductKeyMemory(num_slots=128**2, num_heads=2, top_k=8, value_dim=192)
    return dataclasses.replace(
        base,
        name="books-carried",
        model=ModelConfig(
            dim=192,
            pattern=(local, Block(mixer=Window(256, num_heads=4, sink_tokens=4), ffn=table)),
            repeats=2,
        ),
        data=dataclasses.replace(base.data, order="document"),
        train=dataclasses.replace(base.train, carry="stop"),
    )
