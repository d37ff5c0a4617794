"""What makes recall come early? The quickstart's model, one of its choices taken back at a time.

    memtrain train experiments/recall_early.py:as_it_is
    memtrain train experiments/recall_early.py:random_start
    memtrain train experiments/recall_early.py:plain_keys
    memtrain train experiments/recall_early.py:no_convolutions
    memtrain evaluate runs/recall-early-plain-keys --task recall      # and --task reread

`random_start` begins with keys of their own, `plain_keys` has no convolution on the keys at all,
and `no_convolutions` none anywhere. Same data, steps and seed; the table is in
docs/results/recall-early.md.
"""

import dataclasses
from typing import Any

import quickstart

from memtrain.config import Experiment
from memtrain.description import LayerDescription
from memtrain.layers import Attention, Block, ShortConv


def recipe() -> Experiment:
    return as_it_is()


def as_it_is() -> Experiment:
    return _changed("as-it-is")


def random_start() -> Experiment:
    return _changed("random-start", induction_init=False)


def plain_keys() -> Experiment:
    return _changed("plain-keys", induction_init=False, key_conv=None)


def no_convolutions() -> Experiment:
    base = plain_keys()
    blocks = tuple(
        block
        for block in base.model.pattern
        if not (isinstance(block, Block) and isinstance(block.mixer, ShortConv))
    )
    return dataclasses.replace(
        base,
        name="recall-early-no-convolutions",
        model=dataclasses.replace(base.model, pattern=blocks),
    )


def _changed(name: str, **changes: Any) -> Experiment:
    """The quickstart with its full attention changed."""
    base = quickstart.recipe()

    def attention(layer: LayerDescription | None) -> LayerDescription | None:
        if isinstance(layer, Attention) and layer.window is None:
            return dataclasses.replace(layer, **changes)
        return layer

    pattern = tuple(
        dataclasses.replace(block, mixer=attention(block.mixer))
        for block in base.model.pattern
        if isinstance(block, Block)
    )
    return dataclasses.replace(
        base,
        name=f"recall-early-{name}",
        model=dataclasses.replace(base.model, pattern=pattern),
    )
