"""How the tokens of every row lie over the context axis, and how attention reaches across it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from memtrain.description import LayerDescription
from memtrain.errors import BadInput
from memtrain.parallel.config import MeshConfig
from memtrain_kernels import Layout
from memtrain_kernels.context import Strategy


@dataclass(frozen=True)
class TokenSharding:
    """The layout of tokens over the context axis, and the strategy of attention over it."""

    layout: Layout = Layout()  # noqa: RUF009 (frozen)
    strategy: Strategy = "ring"
    ulysses: int | None = None

    @classmethod
    def of(
        cls, mesh: MeshConfig, layers: Iterable[LayerDescription], seq_len: int
    ) -> TokenSharding:
        """What `mesh` asks for a model of these layers. Raises BadInput for what does not fit."""
        layers = list(layers)
        strategy = "ring" if mesh.context_strategy == "auto" else mesh.context_strategy
        kind = mesh.context_layout
        if kind == "auto":
            whole = any(layer.sees_whole_document for layer in layers)
            kind = "zigzag" if whole and mesh.context > 1 else "contiguous"
        layout = Layout(kind, mesh.context)
        if seq_len % layout.multiple:
            raise BadInput(
                f"train.seq_len={seq_len} cannot be split over mesh.context={mesh.context}: the "
                f"{kind} layout takes multiples of {layout.multiple}; "
                f"nearest {layout.nearest(seq_len)}"
            )
        if mesh.context_ulysses is not None and mesh.context_strategy != "usp":
            raise BadInput(
                f"mesh.context_ulysses={mesh.context_ulysses} is for mesh.context_strategy=usp, "
                f"and this is {mesh.context_strategy}"
            )
        found = cls(layout, strategy, mesh.context_ulysses)
        for layer in layers:
            try:
                layer.check_mesh(mesh)
            except ValueError as error:
                raise BadInput(f"mesh: {error}") from error
        return found


WHOLE = TokenSharding()
"""Rows that are not split."""
