"""How one call is cut, and the arrays that the kernels read beside q, k and v."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memtrain_kernels.attention.hopper.schedule import (
    Summary,
    Walk,
    summarise,
    walks_over_keys,
    walks_over_queries,
)
from memtrain_kernels.attention.hopper.tile import Scoring
from memtrain_kernels.attention.masks import fill_defaults
from memtrain_kernels.attention.spec import AttentionSpec


# Tokens are padded to multiples of this, so that every block length below divides them.
PAD = 128
# Rows that one warpgroup's matrix instruction takes.
ROWS = 64
POS, SEG, SUMMARY = 0, 1, 2
# From this column on the SUMMARY row holds zeros. Added to an index that a loop does not change,
# one keeps the compiler from computing every operand's descriptor ahead of the loop, which costs a
# hundred registers.
ZEROS = 6


@dataclass(frozen=True)
class Blocks:
    """Block lengths in tokens, and how many tiles are in flight.

    block_q is what one thread block owns (forward, dQ) or what a step reads (dK/dV), block_kv the
    other way round. stages, stages_v: buffers of the streamed operands, the first and the second.
    registers: of a thread that computes.
    """

    block_q: int
    block_kv: int
    stages: int
    stages_v: int
    registers: int = 232

    @property
    def memory_registers(self) -> int:
        """Registers of a thread that loads: what two warpgroups that compute leave of 65536."""
        return 504 - 2 * self.registers


# Shared memory holds 227 KiB, a computing thread has 232 or 240 registers: head_dim decides.
FORWARD = {
    64: Blocks(128, 128, 4, 4),
    128: Blocks(128, 128, 2, 2),
    256: Blocks(128, 64, 2, 2),
}
DQ = {64: Blocks(128, 128, 3, 3), 128: Blocks(128, 128, 2, 2, 240), 256: Blocks(128, 64, 2, 1, 240)}
DKV = {
    64: Blocks(128, 128, 2, 2, 240),
    128: Blocks(64, 128, 2, 2, 240),
    256: Blocks(64, 64, 2, 2),
}


@dataclass(frozen=True)
class Plan:
    """One call: B rows, T queries and S keys (padded), H query heads on K key heads of head_dim D.

    token_batch: B, or 1 where all rows share their positions and segments.
    """

    B: int
    T: int
    S: int
    H: int
    K: int
    D: int
    token_batch: int
    spec: AttentionSpec

    @property
    def group(self) -> int:
        return self.H // self.K

    @property
    def overlap(self) -> bool:
        """Whether a backward kernel has the registers to multiply while it takes exponentials."""
        spec = self.spec
        rich = self.D == 256 and (spec.window or spec.prefix)
        return spec.soft_cap is None and not rich

    @property
    def scoring(self) -> Scoring:
        return Scoring.of(self.spec, self.D)


class Tokens(NamedTuple):
    """Padded positions and segments, int32 [token_batch, T or S]; padding is of segment -1."""

    q_pos: jax.Array
    kv_pos: jax.Array
    q_seg: jax.Array
    kv_seg: jax.Array


class Tables(NamedTuple):
    """What one kernel reads of tokens. owner: the blocks that thread blocks own, and their walks.

    own [token_batch, blocks, 3, block], other [token_batch, blocks, 3, block]: rows of positions,
    of segments, and of the Summary's five numbers. walks [token_batch, owned blocks, 8]: the Walk's
    five. All int32.
    """

    own: jax.Array
    other: jax.Array
    walks: jax.Array


def make_plan(q_BTHD: jax.Array, k_BSKD: jax.Array, token_batch: int, spec: AttentionSpec) -> Plan:
    """The plan of arrays that are not padded yet."""
    B, T, H, D = q_BTHD.shape
    S, K = k_BSKD.shape[1:3]
    return Plan(B, padded_length(T), padded_length(S), H, K, D, token_batch, spec)


def make_tokens(
    T: int,
    S: int,
    q_pos: jax.Array | None,
    kv_pos: jax.Array | None,
    q_seg: jax.Array | None,
    kv_seg: jax.Array | None,
) -> Tokens:
    """Defaults filled in, one batch size for all, padded."""
    arrays = fill_defaults(T, S, q_pos, kv_pos, q_seg, kv_seg)
    batch = max(x.shape[0] for x in arrays)
    q_pos, kv_pos, q_seg, kv_seg = (jnp.broadcast_to(x, (batch, x.shape[1])) for x in arrays)
    return Tokens(pad(q_pos), pad(kv_pos), pad(q_seg, -1), pad(kv_seg, -1))


def tables_of_queries(plan: Plan, blocks: Blocks, tokens: Tokens) -> Tables:
    """Tables of a kernel whose thread blocks own queries and stream keys."""
    q = summarise(tokens.q_pos, tokens.q_seg, blocks.block_q)
    kv = summarise(tokens.kv_pos, tokens.kv_seg, blocks.block_kv)
    return Tables(
        _pack(tokens.q_pos, tokens.q_seg, q),
        _pack(tokens.kv_pos, tokens.kv_seg, kv),
        _pack_walks(walks_over_keys(plan.spec, q, kv)),
    )


def tables_of_keys(plan: Plan, blocks: Blocks, tokens: Tokens) -> Tables:
    """Tables of a kernel whose thread blocks own keys and stream queries."""
    q = summarise(tokens.q_pos, tokens.q_seg, blocks.block_q)
    kv = summarise(tokens.kv_pos, tokens.kv_seg, blocks.block_kv)
    return Tables(
        _pack(tokens.kv_pos, tokens.kv_seg, kv),
        _pack(tokens.q_pos, tokens.q_seg, q),
        _pack_walks(walks_over_queries(plan.spec, q, kv)),
    )


def read_summary(table, b, n) -> Summary:
    """The Summary of block n, from a table (an array or a kernel's ref)."""
    return Summary(*(table[b, n, SUMMARY, i] for i in range(len(Summary._fields))))


def read_walk(walks, b, n) -> Walk:
    """The Walk of block n, from a table (an array or a kernel's ref)."""
    return Walk(*(walks[b, n, i] for i in range(len(Walk._fields))))


def _pack(pos: jax.Array, seg: jax.Array, summary: Summary) -> jax.Array:
    batch, blocks = summary.whole.shape
    shape = (batch, blocks, pos.shape[1] // blocks)
    numbers = jnp.stack(summary, axis=-1)
    numbers = jnp.pad(numbers, ((0, 0), (0, 0), (0, shape[2] - numbers.shape[2])))
    return jnp.stack([pos.reshape(shape), seg.reshape(shape), numbers], axis=2)


def _pack_walks(walk: Walk) -> jax.Array:
    numbers = jnp.stack(walk, axis=-1)
    return jnp.pad(numbers, ((0, 0), (0, 0), (0, 8 - numbers.shape[2])))


def padded_length(tokens: int) -> int:
    return math.ceil(tokens / PAD) * PAD


def pad(x: jax.Array, fill: float = 0, axis: int = 1) -> jax.Array:
    """x with its token axis lengthened to a multiple of PAD."""
    missing = padded_length(x.shape[axis]) - x.shape[axis]
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths, constant_values=np.asarray(fill, x.dtype))
