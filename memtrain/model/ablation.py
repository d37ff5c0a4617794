"""Which memories a model has, by name, so that one of them can be left out.

A name is a label, such as `window`, and means every layer of that kind; or a single place, such as
`2.mixer` or `3.ffn`, layers counted from 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from flax import nnx

from memtrain.description import BuildContext, LayerDescription
from memtrain.errors import BadInput
from memtrain.memory.attention import AttentionConfig
from memtrain.memory.bank import BankMemoryConfig
from memtrain.memory.protocol import Memory
from memtrain.model.block import PLACES
from memtrain.model.config import ModelConfig
from memtrain.model.language_model import full_pattern


def layer_label(layer: LayerDescription) -> str:
    """`attention`, `window`, `bank`, or the type in snake case without "Config" and "Memory"."""
    if isinstance(layer, AttentionConfig) and not isinstance(layer, BankMemoryConfig):
        return "attention" if layer.window is None else "window"
    if layer.label is not None:
        return layer.label
    name = type(layer).__name__.removesuffix("Config").removesuffix("Memory")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name or type(layer).__name__).lower()


def memory_names(config: ModelConfig) -> dict[str, list[tuple[int, str]]]:
    """Label -> the (layer, place) pairs of its memories, in order of depth."""
    found: dict[str, list[tuple[int, str]]] = {}
    for index, place, layer in _places(config):
        if _is_memory(layer, config):
            found.setdefault(layer_label(layer), []).append((index, place))
    return found


def resolve_without(config: ModelConfig, names: Sequence[str]) -> tuple[tuple[int, str], ...]:
    """The places that `names` stand for, sorted.

    Besides memories, any place by its own name may be left out, a feed-forward layer too.
    Raises BadInput for a name that stands for nothing, listing those that do.
    """
    labels = memory_names(config)
    places = {f"{index}.{place}": (index, place) for index, place, _ in _places(config)}
    chosen: set[tuple[int, str]] = set()
    for name in names:
        if name in labels:
            chosen.update(labels[name])
        elif name in places:
            chosen.add(places[name])
        else:
            choices = [*labels, *places]
            shown = ", ".join(choices[:12]) + (", ..." if len(choices) > 12 else "")
            raise BadInput(f"without {name!r}: this model has no such memory; it has {shown}")
    return tuple(sorted(chosen))


def _places(config: ModelConfig) -> list[tuple[int, str, LayerDescription]]:
    pattern = full_pattern(config)
    return [
        (index, place, layer)
        for index in range(len(pattern) * config.repeats)
        for place in PLACES
        if (layer := getattr(pattern[index % len(pattern)], place)) is not None
    ]


def _is_memory(layer: LayerDescription, config: ModelConfig) -> bool:
    context = BuildContext(dim=config.dim, dtypes=config.dtypes)
    built = nnx.eval_shape(lambda: layer.build(context, rngs=nnx.Rngs(0)))
    return isinstance(built, Memory)
