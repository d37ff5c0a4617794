"""Trained on segments of 4,096 tokens, read for 262,144: what a state carried in training is for.

    memtrain train experiments/segments.py                   # carried, two segments a step
    memtrain train experiments/segments.py:alone             # every row from an empty memory
    memtrain evaluate runs/segments --task bpb --context 262144

Three Gated DeltaNets and a window of 256 positions. A step reads a row of 8,192 tokens in two
segments, with gradients through the state between them, and hands the state on to the next step
(`train.carry="tbptt"`); the text is the standard library as one document, so that what was trained
with has no end. `alone` reads the same rows in the same order, each from an empty memory.
docs/hybrids.md compares them by position.
"""

import dataclasses

from memtrain.config import Experiment
from memtrain.data.config import DataConfig
from memtrain.layers import Block, GatedDeltaNet, ModelConfig, SwiGLU, Window
from memtrain.train.config import OptimizerConfig, TrainConfig


SEGMENT = 4_096
DELTA = GatedDeltaNet(num_heads=2, head_dim=16, value_dim=32)


def recipe() -> Experiment:
    return carried()


def carried() -> Experiment:
    feed_forward = SwiGLU(hidden=128)
    mixers = (DELTA, DELTA, DELTA, Window(256, num_heads=2))
    return Experiment(
        name="segments",
        model=ModelConfig(
            dim=64, pattern=tuple(Block(mixer=mixer, ffn=feed_forward) for mixer in mixers)
        ),
        data=DataConfig(path=("stdlib",), order="document", join_documents=True),
        train=TrainConfig(
            num_steps=100,
            batch_size=4,
            seq_len=2 * SEGMENT,
            carry="tbptt",
            tbptt_segments=2,
            checkpoint_every_steps=50,
            evaluate_every_steps=50,
            evaluate_batches=4,
            log_every_steps=25,
        ),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=20, schedule="cosine"),
    )


def alone() -> Experiment:
    base = carried()
    train = dataclasses.replace(base.train, carry="none", tbptt_segments=1)
    return dataclasses.replace(base, name="segments-alone", train=train)
