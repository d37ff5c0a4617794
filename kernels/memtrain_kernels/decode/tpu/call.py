"""What is known of a decode call on TPU when it is compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memtrain_kernels.attention.spec import AttentionSpec


@dataclass(frozen=True)
class Call:
    """T queries, G query heads of a key head, S slots of a page, M entries of a block table.

    C pages of a block, N splits. heads_first: pages come as [P, K, S, D], else as [P, S, K, D].
    interpret: as pallas_call takes it.
    """

    spec: AttentionSpec
    scale: float
    T: int
    G: int
    S: int
    M: int
    C: int
    N: int
    heads_first: bool
    interpret: Any = False

    @property
    def tokens(self) -> int:
        """Of a block."""
        return self.C * self.S
