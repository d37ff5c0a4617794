"""Which tokens of a sequence each device holds.

Natural order is the order of the text; device order is what an array sharded along T holds: the
tokens of device 0, then those of device 1. Each device holds as many, in increasing order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np


Kind = Literal["contiguous", "zigzag", "striped"]
KINDS: tuple[Kind, ...] = ("contiguous", "zigzag", "striped")
Tokens = TypeVar("Tokens", jax.Array, np.ndarray)


@dataclass(frozen=True)
class Layout:
    """A sequence over `devices` devices.

    "contiguous": device i holds the i-th of n stretches. "zigzag": stretches i and 2n-1-i of 2n, so
    that causal attention costs every device as much (Zhu, ring-flash-attention 2024). "striped":
    tokens i, i+n, i+2n, ... (Brandon et al. 2023, arXiv 2311.09431); with stripe=s, runs of s.
    """

    kind: Kind = "contiguous"
    devices: int = 1
    stripe: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"layout {self.kind!r}: there are {', '.join(KINDS)}")
        if self.devices < 1 or self.stripe < 1:
            raise ValueError(f"layout of {self.devices} devices, stripe {self.stripe}: give >= 1")

    @property
    def pieces(self) -> int:
        """Stretches of the sequence on one device; a striped device counts as one."""
        return 2 if self.kind == "zigzag" else 1

    @property
    def multiple(self) -> int:
        """What the sequence's length must be a multiple of."""
        if self.devices == 1:
            return 1
        return self.devices * (self.stripe if self.kind == "striped" else self.pieces)

    @property
    def is_natural(self) -> bool:
        """Whether device order is natural order."""
        return self.devices == 1 or self.kind == "contiguous"

    def check(self, length: int, what: str = "sequence") -> None:
        """Raises ValueError for a length that cannot be split, naming the nearest that can."""
        if length % self.multiple:
            raise ValueError(
                f"{what} of {length} tokens: the {self.kind} layout over {self.devices} devices "
                f"takes multiples of {self.multiple}; nearest {self.nearest(length)}"
            )

    def nearest(self, length: int) -> str:
        """The lengths next to this one that can be split, in words."""
        below = length // self.multiple * self.multiple
        return f"{below} or {below + self.multiple}" if below else f"{self.multiple}"

    def arrange(self, x: Tokens, axis: int = 1) -> Tokens:
        """From natural to device order along `axis`."""
        if self.is_natural:
            return x
        axis %= x.ndim
        self.check(x.shape[axis])
        return self._reordered(x, axis, inverse=False)

    def restore(self, x: Tokens, axis: int = 1) -> Tokens:
        """From device to natural order along `axis`."""
        if self.is_natural:
            return x
        axis %= x.ndim
        self.check(x.shape[axis])
        return self._reordered(x, axis, inverse=True)

    def _reordered(self, x: Any, axis: int, inverse: bool) -> Any:
        n, shape = self.devices, x.shape
        before, after = shape[:axis], shape[axis + 1 :]
        if self.kind == "zigzag":
            order = np.stack([np.arange(n), 2 * n - 1 - np.arange(n)], axis=1).reshape(-1)
            if inverse:
                order = np.argsort(order)
            parts = x.reshape(*before, 2 * n, -1, *after)
            return parts.take(order, axis=axis).reshape(shape)
        split = (n, -1) if inverse else (-1, n)
        parts = x.reshape(*before, *split, self.stripe, *after)
        return parts.swapaxes(axis, axis + 1).reshape(shape)

    def indices(self, rank: Any, local: int) -> Any:
        """Natural index of each of a device's `local` tokens, int32 [local]; rank may be traced."""
        xp = np if isinstance(rank, int | np.integer) else jnp
        t = xp.arange(local, dtype=np.int32)
        if self.kind == "contiguous":
            return rank * local + t
        if self.kind == "striped":
            return (t // self.stripe * self.devices + rank) * self.stripe + t % self.stripe
        half = local // 2
        late = (2 * self.devices - 1 - rank) * half + t - half
        return xp.where(t < half, rank * half + t, late)

    def runs(self, rank: int, local: int) -> tuple[range, ...]:
        """A device's pieces as ranges of natural indices; a striped device's has gaps."""
        if self.kind == "contiguous":
            return (range(rank * local, (rank + 1) * local),)
        if self.kind == "zigzag":
            half, late = local // 2, 2 * self.devices - 1 - rank
            return (
                range(rank * half, (rank + 1) * half),
                range(late * half, (late + 1) * half),
            )
        last = int(self.indices(rank, local)[-1])
        return (range(rank * self.stripe, last + 1),)

    def grouped(self, size: int) -> Layout:
        """The layout over groups of `size` neighbouring devices, each taken as one device."""
        if self.devices % size:
            raise ValueError(f"{self.devices} devices are no groups of {size}")
        if size == self.devices:
            return Layout()
        stripe = self.stripe * size if self.kind == "striped" else 1
        return Layout(self.kind, self.devices // size, stripe)

    def join(self, x: jax.Array, size: int, axis: int = 1) -> jax.Array:
        """The tokens of `size` neighbours, one device's after the other's, in increasing order.

        Reshapes and reversals alone: the gradient of a gather would add up by scattering.
        """
        if size == 1 or self.kind == "contiguous":
            return x
        axis %= x.ndim
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        if self.kind == "striped":
            parts = x.reshape(*before, size, -1, self.stripe, *after)
            return parts.swapaxes(axis, axis + 1).reshape(x.shape)
        # Early stretches in the order of the devices, late ones in the reverse.
        parts = x.reshape(*before, size, 2, -1, *after)
        early, late = (jax.lax.index_in_dim(parts, s, axis + 1, keepdims=False) for s in (0, 1))
        return jnp.concatenate([early, jnp.flip(late, axis)], axis=axis).reshape(x.shape)

    def part(self, x: jax.Array, size: int, axis: int = 1) -> jax.Array:
        """The inverse of `join`."""
        if size == 1 or self.kind == "contiguous":
            return x
        axis %= x.ndim
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        if self.kind == "striped":
            parts = x.reshape(*before, -1, size, self.stripe, *after)
            return parts.swapaxes(axis, axis + 1).reshape(x.shape)
        parts = x.reshape(*before, 2, size, -1, *after)
        early, late = (jax.lax.index_in_dim(parts, s, axis, keepdims=False) for s in (0, 1))
        return jnp.stack([early, jnp.flip(late, axis)], axis=axis + 1).reshape(x.shape)
