"""The model layer by layer, under names that outlive the way it was trained.

Training stacks the parameters of all repeats of a pattern; decoding wants one array a layer, since
a step that sliced stacked parameters would copy all of them for every token. Names are by layer:

    embedding  final_norm.scale  unembedding.weight  tables.memory
    layers.3.mixer.query.weight  layers.3.mixer_norm.scale  layers.3.ffn.output.weight
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from memtrain.errors import BadInput
from memtrain.memory.protocol import Context
from memtrain.model.block import PLACES, Block
from memtrain.model.config import ModelConfig
from memtrain.model.language_model import AuxByLayer, LanguageModel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unstacked:
    """A language model, one pytree a layer. `body` is the model without its blocks."""

    body: LanguageModel
    layers: list[Block]

    def init_state(self, batch: int, capacity: int) -> list[dict[str, Any]]:
        """The empty state of every layer."""
        return self.body.init_state(batch, capacity, self.layers)

    def state_spec(self, batch: int, capacity: int) -> list[dict[str, Any]]:
        """For each layer, {place: state spec of its memory}."""
        return [
            {name: m.state_spec(batch, capacity) for name, m in layer.memories().items()}
            for layer in self.layers
        ]

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "B T"],
        state: list[dict[str, Any]] | None,
        ctx: Context,
        *,
        without: Sequence[tuple[int, str]] = (),
    ) -> tuple[Float[Array, "B T D"], list[dict[str, Any]] | None, AuxByLayer]:
        """Normalised hidden states, the new state, and what every layer reports."""
        return self.body(tokens, state, ctx, layers=self.layers, without=without)


def unstack_model(model: LanguageModel) -> Unstacked:
    """The same model layer by layer. Shares every array that is not stacked."""
    body = nnx.merge(*nnx.split(model))
    # One program: sliced leaf by leaf, every shape would compile its own.
    layers = jax.jit(lambda model: model.layers())(model)
    body.blocks = nnx.List([])
    return Unstacked(body, layers)


def stack_model(unstacked: Unstacked) -> LanguageModel:
    """The inverse of `unstack_model`: the model as it is trained."""
    model = nnx.merge(*nnx.split(unstacked.body))
    width = len(unstacked.layers) // model.config.repeats

    def stack(layers: list[Block]) -> list[Block]:
        columns = [layers[i::width] for i in range(width)]
        return [jax.tree.map(lambda *leaves: jnp.stack(leaves), *column) for column in columns]

    model.blocks = nnx.List(jax.jit(stack)(unstacked.layers))
    return model


def abstract_model(config: ModelConfig, vocab_size: int) -> Unstacked:
    """The model's shapes and dtypes, without its numbers."""

    def build() -> Unstacked:
        return unstack_model(LanguageModel(config, vocab_size=vocab_size, rngs=nnx.Rngs(0)))

    return nnx.eval_shape(build)


def tensor_names(unstacked: Unstacked) -> list[str]:
    """The name of each leaf, in tree order."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(unstacked)]
    names = [_name(path) for path in paths]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two tensors of the model are called {twice!r}")
    return names


def _name(path: tuple[Any, ...]) -> str:
    """`.layers[3].mixer.layer.query.weight.value` -> `layers.3.mixer.query.weight`."""
    parts = [
        str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path
    ]
    assert parts[-1] == "value", f"{parts} is not the value of a flax Variable"
    root, *rest = parts[:-1]
    if root == "body":
        return ".".join(rest)
    layer, place, part, *rest = rest
    assert place in PLACES and part in ("norm", "gate", "layer"), parts
    # The place's own norm must not be taken for a part of the layer that is called norm.
    place = place if part == "layer" else f"{place}_{part}"
    return ".".join(["layers", layer, place, *rest])


def to_tensors(unstacked: Unstacked) -> dict[str, np.ndarray]:
    """Every parameter by name, on the host."""
    leaves = jax.device_get(jax.tree.leaves(unstacked))
    return dict(zip(tensor_names(unstacked), leaves, strict=True))


def from_tensors(
    config: ModelConfig, vocab_size: int, tensors: Mapping[str, np.ndarray]
) -> Unstacked:
    """The model with these parameters.

    Raises BadInput for tensors that are missing, too many, or of another shape or dtype.
    """
    abstract = abstract_model(config, vocab_size)
    names = tensor_names(abstract)
    leaves, structure = jax.tree.flatten(abstract)
    for name in tensors:
        if name not in names:
            raise BadInput(f"tensor {name} is no parameter of this model")
    for name, leaf in zip(names, leaves, strict=True):
        if name not in tensors:
            raise BadInput(f"tensor {name} is missing")
        found = tensors[name]
        if (found.shape, jnp.dtype(found.dtype)) != (leaf.shape, leaf.dtype):
            raise BadInput(
                f"tensor {name} is {found.dtype}{list(found.shape)}, "
                f"the model's is {leaf.dtype}{list(leaf.shape)}"
            )
    return jax.tree.unflatten(structure, [jnp.asarray(tensors[name]) for name in names])
