"""A recipe of seconds, for tests that need the command line or a process of its own."""

from memtrain.config import Experiment
from memtrain.data.config import DataConfig
from memtrain.layers import Attention, Block, ModelConfig, ProductKeyMemory, Window
from memtrain.train.config import OptimizerConfig, TrainConfig


def recipe() -> Experiment:
    table = ProductKeyMemory(num_slots=64, num_heads=2, top_k=3, key_dim=8, value_dim=16)
    return Experiment(
        name="tiny",
        model=ModelConfig(
            dim=16,
            pattern=(
                Window(5, num_heads=2),
                Block(mixer=Attention(num_heads=2), ffn=table),
            ),
        ),
        data=DataConfig(path=(__file__,), validation_fraction=0.0),
        train=TrainConfig(
            num_steps=60,
            batch_size=4,
            seq_len=24,
            checkpoint_every_steps=5,
            log_every_steps=5,
            evaluate_every_steps=60,
            evaluate_batches=1,
        ),
        optimizer=OptimizerConfig(warmup_steps=5),
    )


def carried() -> Experiment:
    """The same with windows only, in document order, memory carried from step to step."""
    import dataclasses

    base = recipe()
    return dataclasses.replace(
        base,
        model=dataclasses.replace(
            base.model, pattern=(Window(5, num_heads=2, sink_tokens=1), Window(9, num_heads=2))
        ),
        data=dataclasses.replace(base.data, order="document"),
        train=dataclasses.replace(base.train, carry="stop"),
    )
