"""How a tensor of theirs and parameters of ours are made of each other: one rule for both ways.

PyTorch's linear layers are [out, in], ours [in, out]; theirs may hold several of ours side by side,
in groups of heads. A rule is of one layer, and names are those within it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


Arrays = list[np.ndarray]


@dataclass(frozen=True)
class Layout:
    """What an array of theirs is as one of ours, and back."""

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda a: a, lambda a: a)
MATRIX = Layout(lambda a: a.T, lambda a: a.T)
TAPS = Layout(lambda a: a[:, 0, ::-1].T, lambda a: a.T[:, None, ::-1])
"""Of a depthwise convolution: theirs [channels, 1, size] with the current token last, ours [size,
channels] with the current token first."""


def _shifted(a: np.ndarray, by: float) -> np.ndarray:
    return (a.astype(np.float32) + np.float32(by)).astype(a.dtype)


ZERO_CENTRED = Layout(lambda a: _shifted(a, 1), lambda a: _shifted(a, -1))
"""Scales of a norm that multiplies by 1 + w. In float32 a scale in 0.5..2 comes back bit by bit."""


@dataclass(frozen=True)
class Rule:
    """`read` makes the parameters `ours` of the tensors `theirs`; `write` undoes it.

    Both raise ValueError where shapes do not fit.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    read: Callable[[Arrays], Arrays]
    write: Callable[[Arrays], Arrays]


def rule(
    theirs: str,
    *ours: str,
    layout: Layout = SAME,
    widths: Sequence[int] = (),
    groups: int = 1,
) -> Rule:
    """Of one tensor of theirs, whose first dimension may hold several of ours.

    widths: of each of ours in a group of the first dimension; groups: so many groups.
    """

    def read(arrays: Arrays) -> Arrays:
        (a,) = arrays
        if len(ours) == 1:
            return [layout.read(a)]
        a = a.reshape(groups, sum(widths), *a.shape[1:])
        parts = np.split(a, np.cumsum(widths)[:-1], axis=1)
        return [layout.read(p.reshape(-1, *p.shape[2:])) for p in parts]

    def write(arrays: Arrays) -> Arrays:
        parts = [layout.write(a) for a in arrays]
        if len(ours) == 1:
            return parts
        parts = [p.reshape(groups, -1, *p.shape[1:]) for p in parts]
        a = np.concatenate(parts, axis=1)
        return [a.reshape(-1, *a.shape[2:])]

    return Rule((theirs,), ours, read, write)


def stacked(theirs: Sequence[str], ours: str, layout: Layout = SAME) -> Rule:
    """Of several tensors of theirs that are one of ours, along a dimension in front."""
    return Rule(
        tuple(theirs),
        (ours,),
        lambda arrays: [np.stack([layout.read(a) for a in arrays])],
        lambda arrays: [layout.write(a) for a in arrays[0]],
    )


def swiglu(theirs: str, ours: str) -> list[Rule]:
    """A gated feed-forward layer under the names that all these architectures give it."""
    names = {"gate_proj": "gate", "up_proj": "input", "down_proj": "output"}
    return [
        rule(f"{theirs}{their}.weight", f"{ours}{our}.weight", layout=MATRIX)
        for their, our in names.items()
    ]


def experts(theirs: str, ours: str, number: int) -> list[Rule]:
    """The same of every routed expert."""
    names = {"gate_proj": "gate", "up_proj": "input", "down_proj": "output"}
    return [
        stacked([f"{theirs}{e}.{their}.weight" for e in range(number)], f"{ours}{our}", MATRIX)
        for their, our in names.items()
    ]
