"""What an architecture says of itself, and what all of them have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

from memtrain.description import LayerDescription
from memtrain.errors import BadInput
from memtrain.interop.huggingface.keys import Keys
from memtrain.interop.huggingface.tensors import MATRIX, SAME, Layout, Rule, rule
from memtrain.memory.attention import AttentionConfig
from memtrain.memory.gated_delta import GatedDeltaConfig
from memtrain.memory.mamba1 import Mamba1Config
from memtrain.model.config import Block, ModelConfig
from memtrain.model.feed_forward import SwiGLUConfig, hidden_units
from memtrain.model.moe import MoEConfig


Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plain:
    """A model layer by layer, every field that matters to the arithmetic written out."""

    dim: int
    vocab_size: int
    norm_epsilon: float
    tied_embeddings: bool
    blocks: tuple[Block, ...]

    def config(self, **more: Any) -> ModelConfig:
        """As a model of the library: the shortest pattern that its layers repeat."""
        depth = len(self.blocks)
        period = next(
            n
            for n in range(1, depth + 1)
            if depth % n == 0 and self.blocks == self.blocks[:n] * (depth // n)
        )
        return ModelConfig(
            dim=self.dim,
            pattern=self.blocks[:period],
            repeats=depth // period,
            vocab_size=self.vocab_size,
            tied_embeddings=self.tied_embeddings,
            norm_epsilon=self.norm_epsilon,
            embedding_scale=1.0,
            **more,
        )


@dataclass(frozen=True, kw_only=True)
class Names:
    """Of the tensors outside the layers, and what stands before the names of a layer's."""

    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    unembedding: str = "lm_head.weight"
    layer: str = "model.layers.{}."


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One `model_type`, both ways."""

    model_type: str
    class_name: str
    read: Callable[[Keys], Plain]
    """The model that a config describes. Asks for every key that it understands."""
    write: Callable[[Plain], Json]
    """The config of a model, of which it may take for granted what it does not say: what was
    written is read again and compared."""
    mixers: tuple[type, ...]
    """Descriptions that its layers may have in this place. All of `needs` occur somewhere."""
    ffns: tuple[type, ...]
    """The same; `NoneType` where a layer has none."""
    needs: tuple[type, ...]
    rules: Callable[[Block, int], list[Rule]]
    """The tensors of a layer in a model of this width; ours are called `mixer.norm.scale`,
    `mixer.layer.query.weight`, `ffn.layer.gate.weight` and so on."""
    names: Names = Names()
    norm: Layout = SAME
    """Of the final norm's scale."""
    ignored: tuple[str, ...] = ()
    """Beginnings of the names of tensors that are no part of the language model, and are left."""


def head(keys: Keys, *, tied: bool = False, epsilon: str = "rms_norm_eps") -> Json:
    """What every config says of the model as a whole."""
    return {
        "dim": keys.integer("hidden_size"),
        "vocab_size": keys.integer("vocab_size"),
        "norm_epsilon": keys.number(epsilon, 1e-6 if epsilon == "rms_norm_eps" else 1e-5),
        "tied_embeddings": keys.flag("tie_word_embeddings", tied),
    }


def write_head(model: Plain, *, epsilon: str = "rms_norm_eps") -> Json:
    """See `head`."""
    return {
        "hidden_size": model.dim,
        "vocab_size": model.vocab_size,
        epsilon: model.norm_epsilon,
        "tie_word_embeddings": model.tied_embeddings,
        "num_hidden_layers": len(model.blocks),
        "hidden_act": "silu",
    }


def layer_types(keys: Keys, depth: int, known: Sequence[str], default: list[str]) -> list[str]:
    """The kind of each layer. Raises BadInput where there are not as many as layers."""
    if not keys.has("layer_types"):
        keys.inert("layer_types")
        return default
    kinds = keys.items("layer_types")
    if other := [kind for kind in kinds if kind not in known]:
        raise BadInput(f"{keys.source}: layer_types: {other[0]!r} is none of {', '.join(known)}")
    if len(kinds) != depth:
        raise BadInput(
            f"{keys.source}: layer_types names {len(kinds)} layers, num_hidden_layers is {depth}"
        )
    return kinds


def named(kind: type) -> str:
    """What recipes call a description of this kind."""
    return "nothing" if kind is NoneType else kind.__name__.removesuffix("Config")


def check_kinds(architecture: Architecture, blocks: Sequence[Block]) -> None:
    """Raises BadInput, naming the layer, for a kind that the architecture does not have."""
    for index, block in enumerate(blocks):
        for place, known in (("mixer", architecture.mixers), ("ffn", architecture.ffns)):
            kind = type(getattr(block, place))
            if kind not in known:
                raise BadInput(
                    f"layer {index}, {place}: {named(kind)} has no counterpart in "
                    f"{architecture.model_type}, which has {' or '.join(map(named, known))} there"
                )
        if block.residual_gate:
            raise BadInput(f"layer {index}: residual_gate=True has no counterpart in transformers")
    for kind in architecture.needs:
        if not any(type(block.mixer) is kind for block in blocks):
            raise BadInput(f"a {architecture.model_type} has {named(kind)}, and this model none")


def attention_of(model: Plain) -> list[AttentionConfig]:
    """The attention of each layer that has one."""
    return [b.mixer for b in model.blocks if isinstance(b.mixer, AttentionConfig)]


def projections(theirs: str, **ours: str) -> list[Rule]:
    """Linear layers of a mixer, `q_proj="query"`: one of theirs is one of ours."""
    return [
        rule(f"{theirs}{their}.weight", f"mixer.layer.{our}.weight", layout=MATRIX)
        for their, our in ours.items()
    ]


def place_norms(mixer: str, ffn: str | None = None, layout: Layout = SAME) -> list[Rule]:
    """The norms before a block's two places."""
    rules = [rule(mixer, "mixer.norm.scale", layout=layout)]
    return rules if ffn is None else [*rules, rule(ffn, "ffn.norm.scale", layout=layout)]


def written_out(block: Block, dim: int) -> Block:
    """The block with every field that a layer derives from others given, and those without effect
    on the arithmetic as they are by default."""
    return dataclasses.replace(
        block,
        mixer=None if block.mixer is None else _written_out(block.mixer, dim),
        ffn=None if block.ffn is None else _written_out(block.ffn, dim),
    )


def _written_out(layer: LayerDescription, dim: int) -> LayerDescription:
    def given(**derived: Any) -> LayerDescription:
        return dataclasses.replace(layer, **derived)

    if type(layer) is AttentionConfig:
        head_dim = layer.head_dim or dim // layer.num_heads
        whole = layer.rope_theta is None or layer.rotary_dim == head_dim
        return given(
            num_kv_heads=layer.num_kv_heads or layer.num_heads,
            head_dim=head_dim,
            rotary_dim=None if whole else layer.rotary_dim,
            induction_init=False,
            backend=None,
        )
    if isinstance(layer, SwiGLUConfig):
        return given(hidden=layer.hidden or hidden_units(dim))
    if isinstance(layer, MoEConfig):
        hidden = layer.hidden or hidden_units(dim)
        return given(hidden=hidden, balance_loss=0.0, z_loss=0.0, parallel="hidden")
    if isinstance(layer, Mamba1Config):
        return given(step_rank=layer.step_rank or -(-dim // 16))
    if isinstance(layer, GatedDeltaConfig):
        return given(
            num_key_heads=layer.num_key_heads or layer.num_heads,
            value_dim=layer.value_dim or layer.head_dim,
        )
    return layer
