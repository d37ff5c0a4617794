"""A model's parameters as a flat dict of named arrays, and the skeleton that they are merged into.

Names are paths, such as `blocks.0.mixer.layer.query.weight`: what checkpoints store, freezing
matches and optimizer groups are chosen by.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from memtrain.errors import BadInput
from memtrain.memory.protocol import MemoryTable, Statistic
from memtrain.model.config import ModelConfig
from memtrain.model.language_model import LanguageModel
from memtrain.parallel.sharding import sharding_for


Parameters = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """The model without its arrays: shapes, kinds and logical axes are known before allocation."""

    config: ModelConfig
    vocab_size: int
    graphdef: Any
    variables: Mapping[tuple, nnx.Variable]

    @classmethod
    def of(cls, config: ModelConfig, vocab_size: int) -> Skeleton:
        """Raises BadInput where a layer cannot be built in this model."""
        try:
            abstract = nnx.eval_shape(
                lambda: LanguageModel(config, vocab_size=vocab_size, rngs=nnx.Rngs(0))
            )
        except ValueError as error:
            raise BadInput(f"model: {error}") from error
        graphdef, state = nnx.split(abstract)
        return cls(config, vocab_size, graphdef, dict(nnx.to_flat_state(state)))

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            _name(path): jax.ShapeDtypeStruct(v.shape, v.dtype)
            for path, v in self.variables.items()
        }

    @property
    def tables(self) -> set[str]:
        """Names of memory tables."""
        return {_name(path) for path, v in self.variables.items() if isinstance(v, MemoryTable)}

    @property
    def statistics(self) -> set[str]:
        """Names of what is saved with the model and not trained."""
        return {_name(path) for path, v in self.variables.items() if isinstance(v, Statistic)}

    def axes(self) -> dict[str, tuple[str | None, ...]]:
        """Logical axes by name; stacked parameters have `layers` in front."""
        found = {}
        for path, variable in self.variables.items():
            axes = tuple(variable.get_metadata("logical_axes"))
            found[_name(path)] = ("layers",) * (len(variable.shape) - len(axes)) + axes
        return found

    def shardings(self, mesh: Mesh) -> dict[str, NamedSharding]:
        shapes = self.shapes
        return {
            name: sharding_for(axes, mesh, shapes[name].shape) for name, axes in self.axes().items()
        }

    def init(self, key: Array) -> Parameters:
        """Fresh parameters. Draws depend on the key alone: every mesh begins alike, to rounding."""
        model = LanguageModel(self.config, vocab_size=self.vocab_size, rngs=nnx.Rngs(key))
        return parameters_of(model)

    def merge(self, parameters: Mapping[str, Any]) -> LanguageModel:
        """The model with these parameters, or with their shapes where those are given."""
        flat = {
            path: variable.replace(parameters[_name(path)])
            for path, variable in self.variables.items()
        }
        return nnx.merge(self.graphdef, nnx.from_flat_state(flat))


def parameters_of(model: LanguageModel) -> Parameters:
    """The arrays of a model, by name."""
    _, state = nnx.split(model)
    return {_name(path): variable[...] for path, variable in nnx.to_flat_state(state)}


def count_parameters(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    return sum(s.size for s in shapes.values())


def match_names(patterns: Sequence[str], names: Sequence[str], key: str) -> set[str]:
    """Names that any of the glob patterns matches. They are read in order, and one that begins with
    "!" takes out again what it matches. A pattern that matches nothing is a mistake.
    """
    found: set[str] = set()
    if patterns and patterns[0].startswith("!"):
        raise BadInput(
            f"{key}: {patterns[0]!r} takes out what a pattern before it matched, and is the first: "
            'begin with "*"'
        )
    for pattern in patterns:
        hits = fnmatch.filter(names, pattern.removeprefix("!"))
        if not hits:
            raise BadInput(
                f"{key}: pattern {pattern!r} matches no parameter; names look like {min(names)!r}"
            )
        if pattern.startswith("!"):
            found.difference_update(hits)
        else:
            found.update(hits)
    return found


def cast(parameters: Parameters, dtype: Any) -> Parameters:
    return {
        n: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a
        for n, a in parameters.items()
    }


def _name(path: tuple) -> str:
    return ".".join(map(str, path))
