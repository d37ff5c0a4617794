"""The devices of a mesh axis as a ring of groups: ranks, permutes, gathers, exchanges of heads."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax import lax


@dataclass(frozen=True)
class Members:
    """`size` devices along a mesh axis, in groups of `group` neighbours.

    A ring runs over the groups: device r * group + w is the member of rank r in the ring of lane w.
    Inside a group, heads are exchanged for tokens.
    """

    axis: str
    size: int
    group: int = 1

    @property
    def ranks(self) -> int:
        """Devices of one ring."""
        return self.size // self.group

    def rank(self) -> jax.Array:
        """This device's rank in its ring, int32."""
        return lax.div(lax.axis_index(self.axis), self.group)

    def permute(self, x: jax.Array, pairs: list[tuple[int, int]]) -> jax.Array:
        """x from rank to rank, in every lane; zeros where nothing arrives."""
        lanes = range(self.group)
        all_pairs = [(a * self.group + w, b * self.group + w) for a, b in pairs for w in lanes]
        return lax.ppermute(x, self.axis, all_pairs)

    def gather(self, x: jax.Array) -> jax.Array:
        """x of every rank of the ring, [ranks, ...]."""
        groups = None
        if self.group > 1:
            groups = [
                [rank * self.group + lane for rank in range(self.ranks)]
                for lane in range(self.group)
            ]
        return lax.all_gather(x, self.axis, axis_index_groups=groups)

    def heads_for_tokens(self, x_BTHD: jax.Array) -> jax.Array:
        """[B, T, H, ...] of own tokens to [B, group * T, H / group, ...]: own heads of the group's
        tokens, one device's after the other's."""
        return self._exchange(x_BTHD, split=2, concat=1)

    def tokens_for_heads(self, x_BTHD: jax.Array) -> jax.Array:
        """The inverse of `heads_for_tokens`."""
        return self._exchange(x_BTHD, split=1, concat=2)

    def gather_group(self, x_BT: jax.Array) -> jax.Array:
        """[B, T] of own tokens to [B, group * T] of the group's."""
        return lax.all_gather(
            x_BT, self.axis, axis=1, tiled=True, axis_index_groups=self._neighbours()
        )

    def _exchange(self, x: jax.Array, split: int, concat: int) -> jax.Array:
        return lax.all_to_all(
            x, self.axis, split, concat, axis_index_groups=self._neighbours(), tiled=True
        )

    def _neighbours(self) -> list[list[int]] | None:
        if self.group == self.size:
            return None
        return [
            list(range(rank * self.group, (rank + 1) * self.group)) for rank in range(self.ranks)
        ]
