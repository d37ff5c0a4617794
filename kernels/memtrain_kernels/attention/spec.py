"""What a query may see: the frozen description that every attention backend reads."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass

import jax


MaskFn = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
_FAR = 2**30  # differences of positions below this fit into int32
Window = int | tuple[int | None, int | None] | None


@dataclass(frozen=True)
class AttentionSpec:
    """The mask and the score function of one attention call: frozen, hashable, without arrays.

    A query sees a key if both are of the same segment (never a negative one) and every rule below
    allows it. Positions are the caller's int32 data, so a window is measured in positions, not in
    slots. Positions are above -2**30 and below 2**30.

    Fields:
      causal: kv_pos <= q_pos.
      window: (left, right), or left alone. q_pos - kv_pos < left: `left` positions are seen, the
        query's own included; together with `causal` it is the sliding window. kv_pos - q_pos <
        right, the same ahead. None bounds nothing.
      prefix: keys at positions < prefix are seen by every query of their segment, whatever causal
        and window say (prefix language models).
      soft_cap: scores become soft_cap * tanh(scores / soft_cap), after the scale.
      scale: factor on q . k; None is head_dim ** -0.5.
      sink_tokens: keys at positions < sink_tokens (negative ones too) stay visible left of the
        window (same segment, and causal where that is asked).
      mask_fn: a module-level function of (q_pos, kv_pos, q_seg, kv_seg), int32 arrays that
        broadcast, giving bool, ANDed with the rest. Module-level, so that it is the same object,
        and nothing compiles anew, at every call. Blocks are never skipped on its account.
      ordered: the caller's promise that q and kv are the same tokens in the same order, that the
        tokens of one segment stand together and segments do not decrease along the row, and that
        positions strictly increase inside a segment (tokens of a negative segment may stand at
        either end of a row). It changes no result: it lets causal and window skipping be decided
        by index when the program is compiled.
      block_q, block_kv: block lengths in tokens; None lets the backend choose.

    Raises ValueError for a value that describes no attention.
    """

    causal: bool = True
    window: Window = None
    soft_cap: float | None = None
    scale: float | None = None
    sink_tokens: int = 0
    prefix: int = 0
    mask_fn: MaskFn | None = None
    ordered: bool = False
    block_q: int | None = None
    block_kv: int | None = None

    def __post_init__(self) -> None:
        for name in ("causal", "ordered"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"AttentionSpec.{name} is {getattr(self, name)!r}: give True or False"
                )
        if isinstance(self.window, tuple):
            if len(self.window) != 2 or not all(_is_length(side) for side in self.window):
                raise ValueError(
                    f"AttentionSpec.window is {self.window!r}: give an int >= 1, or two (or "
                    "None): left and right"
                )
            if self.causal and self.window[1] is not None:
                raise ValueError(
                    f"AttentionSpec.window is {self.window!r} and causal hides what is right of a "
                    f"query: give window={self.window[0]!r}, or causal=False"
                )
        elif not _is_length(self.window):
            raise ValueError(
                f"AttentionSpec.window is {self.window!r}: give an int >= 1 and < 2**30, or None"
            )
        for name in ("block_q", "block_kv"):
            if not _is_length(getattr(self, name)):
                raise ValueError(
                    f"AttentionSpec.{name} is {getattr(self, name)!r}: give an int >= 1 and "
                    "< 2**30, or None"
                )
        for name in ("sink_tokens", "prefix"):
            value = getattr(self, name)
            if not _is_int(value) or not 0 <= value < _FAR:
                raise ValueError(f"AttentionSpec.{name} is {value!r}: give an int >= 0 and < 2**30")
        if self.soft_cap is not None and not (_is_number(self.soft_cap) and self.soft_cap > 0):
            raise ValueError(
                f"AttentionSpec.soft_cap is {self.soft_cap!r}: give a finite number > 0, or None"
            )
        if self.scale is not None and not _is_number(self.scale):
            raise ValueError(
                f"AttentionSpec.scale is {self.scale!r}: give a finite Python number, or None"
            )
        if self.mask_fn is not None and not callable(self.mask_fn):
            raise ValueError("AttentionSpec.mask_fn is not callable: give a module-level function")

    @property
    def window_left(self) -> int | None:
        """Positions seen at and before the query's own; None is all."""
        return self.window[0] if isinstance(self.window, tuple) else self.window

    @property
    def window_right(self) -> int | None:
        """Positions seen at and after the query's own, where causal does not hide them."""
        return self.window[1] if isinstance(self.window, tuple) else None

    def scale_for(self, head_dim: int) -> float:
        """The factor on q . k for this head_dim."""
        return head_dim**-0.5 if self.scale is None else self.scale


def _is_length(value: object) -> bool:
    return value is None or (_is_int(value) and 1 <= value < _FAR)  # type: ignore[operator]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and math.isfinite(value)  # type: ignore[arg-type]
