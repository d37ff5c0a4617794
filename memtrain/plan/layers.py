"""The model by kinds of layers: parameters, FLOPs per token, and bytes of state at decode."""

from __future__ import annotations

import dataclasses

import jax

from memtrain.model.ablation import layer_label
from memtrain.model.config import ModelConfig
from memtrain.model.flops import Flops, head_flops, layer_flops
from memtrain.model.language_model import full_pattern
from memtrain.model.parameters import Skeleton
from memtrain.plan.cache import decode_state


@dataclasses.dataclass
class Kind:
    """All layers of one kind together."""

    kind: str
    layers: int = 0
    parameters: int = 0
    flops: Flops = dataclasses.field(default_factory=lambda: Flops(0.0, 0.0, 0.0))
    """Per token, forward."""
    bytes_per_token: int = 0
    bytes_per_sequence: int = 0


def kinds_of_layers(config: ModelConfig, vocab_size: int, seq_len: int) -> list[Kind]:
    """In order of first appearance, then embedding, head and norms, and the shared tables."""
    skeleton = Skeleton.of(config, vocab_size)
    model = skeleton.merge(skeleton.shapes)
    found: dict[str, Kind] = {}

    def entry(name: str) -> Kind:
        return found.setdefault(name, Kind(name))

    place_kinds = {}
    for index, (block, described) in enumerate(
        zip(model.blocks, full_pattern(config), strict=True)
    ):
        for name, place in block.places().items():
            kind = entry(layer_label(getattr(described, name)))
            kind.layers += config.repeats
            kind.flops = kind.flops + layer_flops(place.layer, seq_len)
            place_kinds[f"blocks.{index}.{name}."] = kind
    for name, shape in skeleton.shapes.items():
        kind = next((k for prefix, k in place_kinds.items() if name.startswith(prefix)), None)
        kind = kind or entry("table" if name in skeleton.tables else "embedding and head")
        kind.parameters += _size(shape)
    entry("embedding and head").flops = head_flops(model)
    for row in decode_state(config, vocab_size):
        kind = entry(row["kind"])
        kind.bytes_per_token = row["bytes_per_token"]
        kind.bytes_per_sequence = row["bytes_per_sequence"]
    return list(found.values())


def _size(shape: jax.ShapeDtypeStruct) -> int:
    return shape.size
