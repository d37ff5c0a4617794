"""Descriptions: the frozen dataclasses from which a recipe builds a model.

A description holds hyper-parameters only, is written into every run and artifact as JSON, and makes
its module with `build`. Imports no JAX, so that configurations can be read anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal


if TYPE_CHECKING:
    from flax import nnx

    from memtrain.parallel.config import MeshConfig


DtypeName = Literal["float32", "bfloat16"]


def at_least(config: Any, section: str, least: dict[str, int]) -> None:
    """Raises ValueError for a field below its least value.

    What is no number passes: `memtrain.config.validated` names wrong types.
    """
    for name, bound in least.items():
        value = getattr(config, name)
        if isinstance(value, int | float) and not isinstance(value, bool) and value < bound:
            prefix = f"{section}." if section else ""
            raise ValueError(f"{prefix}{name}={value}: it takes {bound} or more")


def above_zero(config: Any, section: str, name: str) -> None:
    """Raises ValueError for a field that is zero, negative or no number; None passes."""
    value = getattr(config, name)
    if isinstance(value, int | float) and not value > 0:
        prefix = f"{section}." if section else ""
        raise ValueError(f"{prefix}{name}={value}: it takes more than 0")


@dataclass(frozen=True, kw_only=True)
class Dtypes:
    """Dtypes by role. They come from here, never from the dtype of an input."""

    params: DtypeName = "float32"
    tables: DtypeName | None = None
    """Memory tables; as `params` unless given."""
    compute: DtypeName = "float32"
    """Activations and the residual stream."""
    matmul: DtypeName = "float32"
    """Operands of matrix products; results have the dtype of the activations."""
    state: DtypeName = "float32"
    """Keys, values and other content that a memory carries. Sums and statistics stay float32."""

    @property
    def of_tables(self) -> DtypeName:
        return self.tables or self.params


@dataclass(frozen=True, kw_only=True)
class BuildContext:
    """What a layer must know of the model that it becomes a part of."""

    dim: int
    """Width of the residual stream."""
    depth: int = 1
    """Blocks in the model; output projections start smaller in deeper models."""
    dtypes: Dtypes = Dtypes()
    norm_epsilon: float = 1e-6
    """Of every RMS norm: added to the mean square."""


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """A table of learned rows that several layers may read: one Variable of the language model."""

    num_slots: int
    value_dim: int


@dataclass(frozen=True)
class LayerDescription:
    """Base of everything that can stand in a block's mixer or feed-forward place."""

    label: ClassVar[str | None] = None
    """What plans and --without call the layer; its type's name in snake case where None."""
    split: ClassVar[tuple[str, ...]] = ()
    """Fields that count what a mesh's tensor axis splits: heads, hidden units."""

    def build(self, context: BuildContext, *, rngs: nnx.Rngs) -> Any:
        """The module: a `memtrain.memory.Memory`, or any callable module of `[B, T, D]`."""
        raise TypeError(f"{type(self).__name__} does not say how it is built")

    def tables(self) -> dict[str, TableSpec]:
        """Names and shapes of the shared tables that the layer reads."""
        return {}

    @property
    def sees_whole_document(self) -> bool:
        """Whether a token's cost grows with its position, as full attention's does."""
        return False

    def check_mesh(self, mesh: MeshConfig) -> None:
        """Raises ValueError where the layer cannot be split as the mesh asks."""

    def check_vocab(self, vocab_size: int) -> None:
        """Raises ValueError where the layer cannot take all token ids below `vocab_size`."""
