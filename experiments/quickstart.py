"""Five minutes on two CPU cores: a byte-level model with three kinds of memory, on real text.

Windowed attention sees the last 64 bytes, full attention everything in its context, and a
product-key memory keeps what the training text taught in a table. A small share of the rows is a
recall task, so that the report can show at what distance the model still answers.

    memtrain train experiments/quickstart.py
"""

from memtrain.config import Experiment
from memtrain.data.config import DataConfig, RecallTask
from memtrain.layers import Attention, Block, ModelConfig, ProductKeyMemory, SwiGLU, Window
from memtrain.train.config import OptimizerConfig, TrainConfig


def recipe() -> Experiment:
    local = Block(mixer=Window(64, num_heads=4), ffn=SwiGLU(hidden=512))
    return Experiment(
        name="quickstart",
        model=ModelConfig(
            dim=192,
            pattern=(
                local,
                Block(
                    mixer=Attention(num_heads=4),
                    ffn=ProductKeyMemory(num_slots=128**2, num_heads=2, top_k=8, value_dim=192),
                ),
                local,
                Block(mixer=Attention(num_heads=4), ffn=SwiGLU(hidden=512)),
            ),
        ),
        data=DataConfig(path=("stdlib",), recall=RecallTask(share=0.1)),
        train=TrainConfig(
            num_steps=400,
            batch_size=16,
            seq_len=512,
            checkpoint_every_steps=50,
            evaluate_every_steps=200,
            evaluate_batches=8,
            log_every_steps=25,
        ),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=40, schedule="cosine"),
    )
