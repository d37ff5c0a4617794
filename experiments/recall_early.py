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
from memtrain.layers import Attention, ShortConv
from memtrain.recipe import with_layers


def recipe() -> Experiment:
    return as_it_is()


def as_it_is() -> Experiment:
    return _changed("as-it-is")


def random_start() -> Experiment:
    return _changed("random-start", induction_init=False)


def plain_keys() -> Experiment:
    return _changed("plain-keys", induction_init=False, key_conv=None)


def no_convolutions() -> Experiment:
    def change(layer: LayerDescription) -> LayerDescription | None:
        return None if isinstance(layer, ShortConv) else layer

    return with_layers(plain_keys(), change, name="recall-early-no-convolutions")


def _changed(name: str, **changes: Any) -> Experiment:
    """The quickstart with its full attention changed."""

    def change(layer: LayerDescription) -> LayerDescription:
        if isinstance(layer, Attention) and layer.window is None:
            return dataclasses.replace(layer, **changes)
        return layer

    return with_layers(quickstart.recipe(), change, name=f"recall-early-{name}")
