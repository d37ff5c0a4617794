"""Recipes that the tests of the command plan: a small one, and one that no device can hold."""

import dataclasses

from memtrain.config import Experiment
from memtrain.layers import Attention, Block, ModelConfig, ProductKeyMemory, Window
from memtrain.train.config import TrainConfig


def small() -> Experiment:
    table = ProductKeyMemory(num_slots=64, num_heads=2, top_k=3, key_dim=8, value_dim=16)
    return Experiment(
        name="small",
        model=ModelConfig(
            dim=32,
            pattern=(
                Window(16, num_heads=4),
                Block(mixer=Attention(num_heads=4, num_kv_heads=2), ffn=table),
            ),
        ),
        train=TrainConfig(batch_size=4, seq_len=64),
    )


def large() -> Experiment:
    """4.4 billion parameters, whose training state alone takes 50 GiB."""
    base = small()
    model = dataclasses.replace(
        base.model,
        dim=4096,
        pattern=(Attention(num_heads=32, num_kv_heads=8, head_dim=128),),
        repeats=24,
        vocab_size=32_768,
        remat="full",
    )
    train = TrainConfig(batch_size=8, seq_len=8192)
    return dataclasses.replace(base, name="large", model=model, train=train)
