"""Three minutes on two CPU cores: a byte-level model with four kinds of memory, on real text.

Short convolutions mix the last four bytes, windowed attention sees the last 64, full attention
everything in its context, and a product-key memory keeps what the training text taught in a table.
Keys know the byte before their own, so that a layer can find what followed a name earlier and say
it again; a tenth of the rows asks for facts told before, and a tenth is a passage read twice, so
that the report can show what is remembered, and how far.

    memtrain train experiments/quickstart.py
"""

from memtrain.config import Experiment
from memtrain.data.config import DataConfig, RecallTask, RereadTask
from memtrain.layers import (
    Attention,
    Block,
    ModelConfig,
    ProductKeyMemory,
    ShortConv,
    SwiGLU,
    Window,
)
from memtrain.train.config import OptimizerConfig, TrainConfig


def recipe() -> Experiment:
    mix = Block(mixer=ShortConv(4))
    local = Window(64, num_heads=2)
    whole = Attention(num_heads=2, rope_theta=None, key_conv=2, induction_init=True)
    table = ProductKeyMemory(num_slots=128**2, num_heads=2, top_k=8, value_dim=192)
    plain = SwiGLU(hidden=512)
    return Experiment(
        name="quickstart",
        model=ModelConfig(
            dim=192,
            pattern=(
                mix,
                Block(mixer=local, ffn=table),
                mix,
                Block(mixer=whole, ffn=plain),
                mix,
                Block(mixer=local, ffn=plain),
            ),
        ),
        data=DataConfig(
            path=("stdlib",), recall=RecallTask(share=0.1), reread=RereadTask(share=0.1)
        ),
        train=TrainConfig(
            num_steps=500,
            batch_size=8,
            seq_len=512,
            checkpoint_every_steps=50,
            evaluate_every_steps=100,
            evaluate_batches=16,
            log_every_steps=25,
        ),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=50, schedule="cosine"),
    )
