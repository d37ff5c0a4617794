"""How the tokens of every row lie over the context axis, and how attention reaches across it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from memtrain.description import LayerDescription
from memtrain.errors import BadInput
from memtrain.parallel.config import MeshConfig
from memtrain.parallel.links import permutes_wait
from memtrain_kernels import Layout
from memtrain_kernels.context import Strategy


@dataclass(frozen=True)
class TokenSharding:
    """The layout of tokens over the context axis, and the strategy of attention over it."""

    layout: Layout = Layout()  # noqa: RUF009 (frozen)
    strategy: Strategy = "ring"
    ulysses: int | None = None
    why: str = field(default="", compare=False)
    """Why "auto" took another strategy than the ring, for people."""

    @classmethod
    def of(
        cls,
        mesh: MeshConfig,
        layers: Iterable[LayerDescription],
        seq_len: int,
        device_kind: str = "",
    ) -> TokenSharding:
        """What `mesh` asks for a model of these layers, on devices of a kind.

        Raises BadInput for what does not fit.
        """
        layers = list(layers)
        strategy, why = strategy_of(mesh, layers, device_kind)
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
        found = cls(layout, strategy, mesh.context_ulysses, why)
        for layer in layers:
            try:
                layer.check_mesh(mesh)
            except ValueError as error:
                raise BadInput(f"mesh: {error}") from error
        return found


def strategy_of(
    mesh: MeshConfig, layers: Iterable[LayerDescription], device_kind: str = ""
) -> tuple[Strategy, str]:
    """The strategy of attention, "auto" resolved, and in words why it is not the ring.

    A ring costs nothing while its permutes hide behind arithmetic. Where they cannot, a layer that
    sees whole documents takes every hop's time as it is, and exchanging heads in groups makes the
    ring shorter by their size.
    """
    if mesh.context_strategy != "auto":
        return mesh.context_strategy, ""
    waits = mesh.context > 1 and permutes_wait(device_kind, mesh.num_devices)
    if not waits or not any(layer.sees_whole_document for layer in layers):
        return "ring", ""
    return "usp", (
        f"on {mesh.num_devices} x {device_kind} a ring's permutes wait for the arithmetic: heads "
        "are exchanged in groups, which leaves fewer of them (mesh.context_strategy=usp)"
    )


WHOLE = TokenSharding()
"""Rows that are not split."""
