"""How long the tiles of each kernel are, on each chip."""

from __future__ import annotations

from typing import NamedTuple

import jax

from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.target import current_target


# Scores lie with keys (or, in dK/dV, queries) along the 128 lanes.
LANES = 128
# A window shorter than this is read in blocks of this length: a tile has a fixed cost.
_SHORTEST = 256


class Blocks(NamedTuple):
    """Tokens of a tile: queries and keys."""

    q: int
    kv: int


# (forward, backward) by head_dim. Chosen so that the compiler fits them into on-chip memory; no
# TPU has timed them yet. v5e and v6e hold 128 MiB of it, v5p 64.
_TABLE: dict[str, dict[int, tuple[Blocks, Blocks]]] = {
    "v5e": {
        64: (Blocks(1024, 1024), Blocks(512, 1024)),
        128: (Blocks(1024, 1024), Blocks(512, 1024)),
        256: (Blocks(512, 1024), Blocks(512, 512)),
    },
    "v5p": {
        64: (Blocks(1024, 1024), Blocks(512, 1024)),
        128: (Blocks(1024, 1024), Blocks(512, 1024)),
        256: (Blocks(512, 1024), Blocks(512, 512)),
    },
    "v6e": {
        64: (Blocks(1024, 1024), Blocks(512, 1024)),
        128: (Blocks(1024, 1024), Blocks(512, 1024)),
        256: (Blocks(1024, 1024), Blocks(512, 1024)),
    },
    "default": {
        64: (Blocks(512, 512), Blocks(512, 512)),
        128: (Blocks(512, 512), Blocks(512, 512)),
        256: (Blocks(512, 512), Blocks(256, 512)),
    },
}
# Parts of jax's device kinds, the first that occurs.
_CHIPS = {"v5 lite": "v5e", "v5e": "v5e", "v5": "v5p", "v6": "v6e"}


def chip() -> str:
    """The row of the table for the devices that a program is traced for: those of the mesh that is
    set (a described slice, too), else this process's."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    kind = (current_target() if described is None else described).device_kind.lower()
    if "tpu" not in kind:
        return "default"
    return next((name for part, name in _CHIPS.items() if part in kind), "default")


def blocks_for(
    spec: AttentionSpec, head_dim: int, T: int, S: int, chip: str
) -> tuple[Blocks, Blocks]:
    """The tiles of the forward and of the backward kernels, in tokens.

    spec.block_q and spec.block_kv win; a short window and short sequences shorten the rest.
    Raises ValueError for a block that is no multiple of 128.
    """
    for name, block in (("block_q", spec.block_q), ("block_kv", spec.block_kv)):
        if block is not None and block % LANES:
            raise ValueError(
                f"AttentionSpec.{name} is {block}: backend 'tpu' takes multiples of {LANES}"
            )
    longest = _window_block(spec)

    def fit(blocks: Blocks) -> Blocks:
        q = spec.block_q or min(blocks.q, longest)
        kv = spec.block_kv or min(blocks.kv, longest)
        return Blocks(min(q, _whole_lanes(T)), min(kv, _whole_lanes(S)))

    forward, backward = _TABLE[chip][head_dim]
    return fit(forward), fit(backward)


def _window_block(spec: AttentionSpec) -> int:
    """A block no longer than a sliding window needs: a tile is computed whole."""
    right = 1 if spec.causal else spec.window_right
    if spec.window_left is None or right is None:
        return 1 << 30
    return max(_SHORTEST, 1 << (spec.window_left + right - 2).bit_length())


def _whole_lanes(tokens: int) -> int:
    return -(-tokens // LANES) * LANES
