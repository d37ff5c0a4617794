"""Models whose layers keep a state of fixed size, alone and beside attention.

    memtrain train experiments/hybrids.py:samba
    memtrain plan experiments/hybrids.py:qwen_next

`gated_delta`, `mamba2` and `mamba1` have one kind of recurrent layer and nothing else. `samba` has
as many windows as Mamba layers (Ren et al. 2024, arXiv 2406.07522); `qwen_next` three Gated
DeltaNets for each attention (Qwen3-Next), here of a window, which can be carried; `jamba` seven
Mamba layers for each attention and, in every other layer, a mixture of 16 experts of which a token
is sent to two (Lieber et al. 2024, arXiv 2403.19887). All have eight layers of width 128. They read
rows of 512 bytes in document order with their state carried from row to row, so that what they were
trained with has no end; `jamba`, whose attention sees all of a document, whole documents.
"""

from typing import Literal

from memtrain.config import Experiment
from memtrain.data.config import DataConfig
from memtrain.description import LayerDescription
from memtrain.layers import (
    Attention,
    Block,
    GatedDeltaNet,
    Mamba1,
    Mamba2,
    ModelConfig,
    MoE,
    SwiGLU,
    Window,
)
from memtrain.train.config import OptimizerConfig, TrainConfig


DELTA = GatedDeltaNet(num_heads=2, head_dim=32, value_dim=64)
MAMBA1 = Mamba1(state_dim=16)
MAMBA2 = Mamba2(head_dim=32, state_dim=32)
WINDOW = Window(64, num_heads=2)
FEED_FORWARD = SwiGLU(hidden=256)
# Jamba's published setting: 16 experts, two a token, weights that do not add up to 1.
EXPERTS = MoE(16, 2, hidden=256, normalize=False)


def recipe() -> Experiment:
    return samba()


def gated_delta() -> Experiment:
    return _model("gated-delta", DELTA, repeats=8)


def mamba2() -> Experiment:
    return _model("mamba2", MAMBA2, repeats=8)


def mamba1() -> Experiment:
    return _model("mamba1", MAMBA1, repeats=8)


def samba() -> Experiment:
    return _model("samba", MAMBA1, WINDOW, repeats=4)


def qwen_next() -> Experiment:
    # Attention over what the carried window of its document holds: 1,024 bytes.
    return _model("qwen-next", DELTA, DELTA, DELTA, Window(1024, num_heads=2), repeats=2)


def jamba() -> Experiment:
    mixers = [*[MAMBA1] * 4, Attention(num_heads=2), *[MAMBA1] * 3]
    pattern = [
        Block(mixer=mixer, ffn=EXPERTS if layer % 2 else FEED_FORWARD)
        for layer, mixer in enumerate(mixers)
    ]
    return _model("jamba", *pattern, repeats=1, carry="none")


def _model(
    name: str,
    *pattern: LayerDescription | Block,
    repeats: int,
    carry: Literal["none", "stop"] = "stop",
) -> Experiment:
    return Experiment(
        name=name,
        model=ModelConfig(dim=128, pattern=pattern, ffn=FEED_FORWARD, repeats=repeats),
        data=DataConfig(path=("stdlib",), order="document" if carry == "stop" else "packed"),
        train=TrainConfig(
            num_steps=300,
            batch_size=8,
            seq_len=512,
            carry=carry,
            checkpoint_every_steps=100,
            evaluate_every_steps=100,
            evaluate_batches=16,
            log_every_steps=25,
        ),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=50, schedule="cosine"),
    )
