"""The same model with and without the memory layer: what does the table buy?

    memtrain train experiments/with_and_without.py:with_memory    --seeds 3
    memtrain train experiments/with_and_without.py:without_memory --seeds 3
    memtrain train experiments/with_and_without.py:same_parameters --seeds 3

`without_memory` has a SwiGLU of about the arithmetic of the memory layer in its place;
`same_parameters` has one with about as many parameters, so it computes far more for every token.
Each run directory gets a mean and a spread over the seeds.
"""

import dataclasses

from memtrain.config import Experiment
from memtrain.data.config import DataConfig
from memtrain.description import LayerDescription
from memtrain.layers import Attention, Block, ModelConfig, ProductKeyMemory, SwiGLU, Window
from memtrain.train.config import OptimizerConfig, TrainConfig


DIM = 192
TABLE = ProductKeyMemory(num_slots=128**2, num_heads=2, top_k=8, key_dim=128, value_dim=DIM)


def with_memory() -> Experiment:
    return _model("with-memory", TABLE)


def without_memory() -> Experiment:
    # Per token the memory layer multiplies by DIM x (256 + 192 + 192) and scores 2 x 128 half-keys
    # of width 128; three matrices of DIM x 272 cost the same.
    return _model("without-memory", SwiGLU(hidden=272))


def same_parameters() -> Experiment:
    # 128^2 rows of DIM values, the half-keys and the projections, in three matrices of DIM x 5750.
    return _model("same-parameters", SwiGLU(hidden=5750))


def recipe() -> Experiment:
    return with_memory()


def _model(name: str, ffn: LayerDescription) -> Experiment:
    plain = SwiGLU(hidden=512)
    return Experiment(
        name=name,
        model=ModelConfig(
            dim=DIM,
            pattern=(
                Block(mixer=Window(64, num_heads=4), ffn=plain),
                Block(mixer=Attention(num_heads=4), ffn=ffn),
                Block(mixer=Window(64, num_heads=4), ffn=plain),
                Block(mixer=Attention(num_heads=4), ffn=plain),
            ),
        ),
        data=DataConfig(path=("stdlib",)),
        train=TrainConfig(num_steps=600, batch_size=16, seq_len=512, evaluate_every_steps=200),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=40),
    )


def tiny() -> Experiment:
    """A few seconds, to see that everything runs."""
    base = with_memory()
    return dataclasses.replace(
        base, train=dataclasses.replace(base.train, num_steps=10, batch_size=4, seq_len=128)
    )
