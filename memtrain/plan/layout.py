"""How a mesh splits the tokens and heads of a model, as the train step will: and what it sends."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from memtrain.config import Experiment
from memtrain.description import LayerDescription
from memtrain.memory.attention import AttentionConfig
from memtrain.memory.ngram import NGramMemoryConfig
from memtrain.memory.product_key import ProductKeyMemoryConfig
from memtrain.model.config import ModelConfig
from memtrain.model.language_model import full_pattern
from memtrain.parallel.tokens import TokenSharding, strategy_of
from memtrain_kernels import AttentionSpec
from memtrain_kernels.context import Layout, plan_ring, ulysses_degree


# The hops of a window depend on how many devices there are only where these are few.
_ENOUGH_DEVICES = 64


def layers_of(config: ModelConfig) -> list[tuple[int, str, LayerDescription]]:
    """(block, place, description) of every layer of one repeat."""
    return [
        (index, place, layer)
        for index, block in enumerate(full_pattern(config))
        for place in ("mixer", "ffn")
        if (layer := getattr(block, place)) is not None
    ]


def attention_layers(config: ModelConfig) -> Iterator[tuple[int, AttentionConfig]]:
    """(block, description) of every attention layer of one repeat."""
    for index, _, layer in layers_of(config):
        if isinstance(layer, AttentionConfig):
            yield index, layer


@dataclasses.dataclass(frozen=True)
class Lookup:
    """What one layer reads of a table for a token: `rows`, each of `value_dim` numbers.

    answers: vectors that the rows are summed to, `rows` of them where each is wanted for itself.
    """

    table: str
    rows: int
    value_dim: int
    answers: int


def lookups(config: ModelConfig) -> list[Lookup]:
    """What the layers of one repeat read of tables, layer by layer."""
    found = []
    for _, _, layer in layers_of(config):
        if isinstance(layer, ProductKeyMemoryConfig):
            rows = layer.num_heads * layer.top_k
            found.append(Lookup(layer.table, rows, layer.value_dim, 1))
        elif isinstance(layer, NGramMemoryConfig):
            rows = layer.hashing.num_parts
            found.append(Lookup(layer.table, rows, layer.head_dim, rows))
    return found


def tokens_of(experiment: Experiment) -> TokenSharding:
    """The layout and strategy, "auto" resolved.

    Raises BadInput where the sequence or the heads cannot be split so, naming what can.
    """
    layers = [layer for _, _, layer in layers_of(experiment.model)]
    return TokenSharding.of(experiment.mesh, layers, experiment.train.seq_len)


def on_device(experiment: Experiment, device_kind: str) -> tuple[Experiment, str]:
    """The experiment with the strategy that such devices get under "auto", and why, in words."""
    layers = [layer for _, _, layer in layers_of(experiment.model)]
    strategy, why = strategy_of(experiment.mesh, layers, device_kind)
    if not why:
        return experiment, why
    mesh = dataclasses.replace(experiment.mesh, context_strategy=strategy)
    return dataclasses.replace(experiment, mesh=mesh), why


def ulysses_of(layer: AttentionConfig, experiment: Experiment) -> int:
    """Devices of the context axis that exchange this layer's heads."""
    mesh, tokens = experiment.mesh, tokens_of(experiment)
    heads, kv_heads = layer.num_heads, layer.num_kv_heads or layer.num_heads
    if kv_heads % mesh.tensor == 0:
        heads, kv_heads = heads // mesh.tensor, kv_heads // mesh.tensor
    return ulysses_degree(tokens.strategy, mesh.context, heads, kv_heads, tokens.ulysses)


def hops_of(layer: AttentionConfig, experiment: Experiment) -> tuple[int, float]:
    """Permutes that bring one layer the keys and values of other devices, and what they carry.

    The second counts in chunks: the tokens of one device of the ring.
    """
    tokens = tokens_of(experiment)
    if tokens.strategy == "all_gather":
        return 0, experiment.mesh.context - 1.0
    devices = experiment.mesh.context // ulysses_of(layer, experiment)
    if devices == 1:
        return 0, 0.0
    if layer.window is None:
        return devices - 1, devices - 1.0
    local = -(-experiment.train.seq_len // devices)
    few = min(devices, _ENOUGH_DEVICES, max(4, 4 * -(-layer.window // local) + 4))
    layout = Layout(tokens.layout.kind, few)
    local += -local % layout.pieces
    spec = AttentionSpec(window=layer.window, sink_tokens=layer.sink_tokens, ordered=True)
    schedule, _ = plan_ring(spec, layout, local, local, by_default=False, segments=True)
    carried = sum(len(hop.pieces) for chain in schedule.chains for hop in chain)
    scale = (devices - 1) / (few - 1) if schedule.complete else 1.0
    return round(schedule.hops * scale), carried / layout.pieces * scale
