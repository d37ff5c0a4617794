"""The golden path: every part of memtrain in one small run. `tests/golden` holds it to its word.

A window, a gated delta rule, a bank, full attention with convolved keys and a product-key memory
whose table two layers share, on a mesh of all axes but one; it is killed, resumes on another mesh,
is exported, decodes from its cache and is evaluated. It grows with every kind of memory built.
"""

from memtrain.config import Experiment
from memtrain.data.config import DataConfig, RecallTask, RereadTask
from memtrain.layers import (
    Attention,
    BankMemory,
    Block,
    GatedDelta,
    ModelConfig,
    ProductKeyMemory,
    Window,
)
from memtrain.parallel.config import MeshConfig
from memtrain.train.config import OptimizerConfig, TrainConfig


def recipe() -> Experiment:
    table = ProductKeyMemory(num_slots=256, num_heads=2, top_k=4, key_dim=16, value_dim=32)
    return Experiment(
        name="golden",
        model=ModelConfig(
            dim=64,
            pattern=(
                Window(16, num_heads=4, num_kv_heads=2, sink_tokens=2),
                Block(mixer=GatedDelta(num_heads=2, head_dim=16)),
                BankMemory(num_heads=4, num_kv_heads=2, window=8, bank_size=24, top_k=4),
                Block(
                    mixer=Attention(num_heads=4, num_kv_heads=2, key_conv=2, induction_init=True),
                    ffn=table,
                ),
            ),
            repeats=2,
        ),
        data=DataConfig(
            path=("stdlib",),
            recall=RecallTask(share=0.25, num_facts=2, num_queries=2),
            reread=RereadTask(share=0.25, min_len=16),
        ),
        train=TrainConfig(
            num_steps=24,
            batch_size=8,
            seq_len=96,
            checkpoint_every_steps=8,
            evaluate_every_steps=12,
            evaluate_batches=2,
            log_every_steps=4,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=4),
        mesh=MeshConfig(fsdp=2, context=2, tensor=2),
    )
