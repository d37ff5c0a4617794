"""What is a bank worth when a text comes again? In the quickstart's model, for its full attention.

    memtrain train experiments/bank_reread.py:bank
    memtrain train experiments/bank_reread.py:one_softmax
    memtrain train experiments/bank_reread.py:window
    memtrain evaluate runs/bank-reread-bank --task reread

`bank` looks up 8 of the 4,096 positions before a window of 64, and joins them by a gate;
`one_softmax` joins them with the window under one softmax; `window` has the window alone. All have
the same projections, convolved keys and start, the same data, steps and seed; `full` is the
quickstart's own full attention.
"""

import dataclasses
from typing import Any

import quickstart

from memtrain.config import Experiment
from memtrain.description import LayerDescription
from memtrain.layers import Attention, BankMemory, Block


ALIKE: dict[str, Any] = {
    "num_heads": 2,
    "window": 64,
    "rope_theta": None,
    "key_conv": 2,
    "induction_init": True,
}
BANK: dict[str, Any] = {"bank_size": 4096, "top_k": 8}


def recipe() -> Experiment:
    return bank()


def bank() -> Experiment:
    return _with("bank", BankMemory(**ALIKE, **BANK))


def one_softmax() -> Experiment:
    return _with("one-softmax", BankMemory(**ALIKE, **BANK, join="softmax"))


def window() -> Experiment:
    return _with("window", Attention(**ALIKE))


def full() -> Experiment:
    return _with("full", dataclasses.replace(Attention(**ALIKE), window=None))


def _with(name: str, layer: LayerDescription) -> Experiment:
    """The quickstart with this layer where its full attention is."""
    base = quickstart.recipe()
    pattern = tuple(
        dataclasses.replace(block, mixer=layer)
        if isinstance(block.mixer, Attention) and block.mixer.window is None
        else block
        for block in base.model.pattern
        if isinstance(block, Block)
    )
    return dataclasses.replace(
        base,
        name=f"bank-reread-{name}",
        model=dataclasses.replace(base.model, pattern=pattern),
    )
