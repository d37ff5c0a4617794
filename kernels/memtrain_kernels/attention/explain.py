"""What a call of attention will do, without doing it."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from memtrain_kernels.attention.backends import (
    BACKENDS,
    backend_module,
    is_verified,
    resolve_backend,
    why_not,
)
from memtrain_kernels.attention.blocks import (
    Plan,
    Summary,
    full_tiles,
    live_tiles,
    make_plan,
    pad_tokens,
    summarise,
)
from memtrain_kernels.attention.capabilities import Problem
from memtrain_kernels.attention.checks import IntArray, Shaped, checked
from memtrain_kernels.attention.masks import fill_defaults
from memtrain_kernels.attention.merge import Partial
from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.target import current_target


@dataclass(frozen=True)
class Explanation:
    """One call of attention before it runs.

    block_q, block_kv: tokens of a tile. skipped_share: of all tiles, those that the mask empties
    and that are not computed; partial_share: those that are computed under a mask. flops_forward,
    flops_backward: matrix products of the tiles that are computed (two and five a tile).
    bytes_forward: what is read and written if every operand passes memory once. refusals: of each
    other backend, why it does not serve this call here; empty where it could.
    """

    backend: str
    reason: str
    verified: bool
    block_q: int
    block_kv: int
    skipped_share: float
    partial_share: float
    flops_forward: float
    flops_backward: float
    bytes_forward: int
    refusals: dict[str, str]

    def __str__(self) -> str:
        lines = [
            f"backend   {self.backend} ({self.reason})",
            f"verified  {'yes' if self.verified else 'no: never compared on this kind of device'}",
            f"tiles     {self.block_q} x {self.block_kv} tokens; {self.skipped_share:.1%} skipped, "
            f"{self.partial_share:.1%} masked",
            f"forward   {self.flops_forward:.3g} FLOP, {self.bytes_forward / 2**20:.1f} MiB",
            f"backward  {self.flops_backward:.3g} FLOP",
        ]
        lines += [f"{name:<9} {why or 'could serve too'}" for name, why in self.refusals.items()]
        return "\n".join(lines)


def explain(
    q: Shaped,
    k: Shaped,
    v: Shaped,
    *,
    spec: AttentionSpec = AttentionSpec(),  # noqa: B008 (frozen)
    q_positions: IntArray | None = None,
    kv_positions: IntArray | None = None,
    q_segments: IntArray | None = None,
    kv_segments: IntArray | None = None,
    sink_logits: jax.Array | None = None,
    prior: Partial | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Explanation:
    """What `attention` would do with these arguments: see `Explanation`.

    q [B, T, H, D], k [B, S, Hkv, D], v [B, S, Hkv, Dv] are arrays or shapes; positions and segments
    are numbers, [B or 1, T or S] or [T or S], as they decide which tiles are skipped. Raises
    ValueError as `attention` does.
    """
    given = (q_positions, kv_positions, q_segments, kv_segments)
    problem, tokens = checked(q, k, v, spec, given, sink_logits, prior, return_lse)
    name, reason = resolve_backend(backend, problem)
    target = current_target()
    block_q, block_kv = block_sizes(name, problem)
    live, full = _tiles(name, problem, fill_defaults(problem.T, problem.S, *tokens))
    share_live, share_full = float(live.mean()), float((live & full).mean())
    tile_flops = 2.0 * problem.B * problem.H * block_q * block_kv
    num_live = share_live * live[0].size
    d_e = problem.head_dim + problem.value_dim
    itemsize = jnp.dtype(problem.dtype).itemsize
    queries = problem.B * problem.T * problem.H
    numbers = queries * d_e + problem.B * problem.S * problem.K * d_e
    return Explanation(
        backend=name,
        reason=reason,
        verified=is_verified(name, target.device_kind),
        block_q=block_q,
        block_kv=block_kv,
        skipped_share=1 - share_live,
        partial_share=share_live - share_full,
        flops_forward=num_live * tile_flops * d_e,
        # s, dp, dv from the value side; dq and dk from the key side.
        flops_backward=num_live * tile_flops * (3 * problem.head_dim + 2 * problem.value_dim),
        bytes_forward=numbers * itemsize + 4 * queries,
        refusals={
            other: why_not(other, problem, target) or "" for other in BACKENDS if other != name
        },
    )


def block_sizes(name: str, problem: Problem) -> tuple[int, int]:
    """Tokens of queries and keys in a tile, as the backend chooses them for this problem.

    A backend with blocks of its own says so by `tile_of(problem)` in its module.
    """
    tile_of = getattr(backend_module(name), "tile_of", None)
    if tile_of is not None:
        return tile_of(problem)
    if name == "reference":
        return problem.T, problem.S
    plan = _plan(problem)
    return plan.block_q, plan.block_kv


def _plan(p: Problem) -> Plan:
    by_default, data = not p.positions, p.positions or p.segments
    return make_plan(p.T, p.S, p.H // p.K, by_default, data, p.spec)


def _tiles(name: str, problem: Problem, tokens) -> tuple[np.ndarray, np.ndarray]:
    """Tiles that are computed, and those of them that need no mask: bool [B or 1, num_q, num_kv].

    "xla" takes the batch together: it skips what every row skips. Where it writes tiles out, what
    indices rule out is all that it skips, and every tile is masked.
    """
    block_q, block_kv = block_sizes(name, problem)
    if name in ("reference", "cudnn"):  # the whole is computed, or nothing is known of it
        tiles = np.ones((1, -(-problem.T // block_q), -(-problem.S // block_kv)), bool)
        return tiles, ~tiles
    if name == "xla" and (plan := _plan(problem)).unrolled:
        live = np.zeros((1, plan.num_q, plan.num_kv), bool)
        for i in range(plan.num_q):
            live[0, i, plan.kv_tiles(i)] = True
        return live, np.zeros_like(live)
    q_pos, kv_pos, q_seg, kv_seg = tokens
    q, kv = (
        summarise(pad_tokens(pos, 1, block), pad_tokens(seg, 1, block, fill=-1), block)
        for pos, seg, block in ((q_pos, q_seg, block_q), (kv_pos, kv_seg, block_kv))
    )
    q, kv = Summary(*(x[:, :, None] for x in q)), Summary(*(x[:, None, :] for x in kv))
    live = np.asarray(live_tiles(problem.spec, q, kv))
    full = np.asarray(full_tiles(problem.spec, q, kv))
    if name == "xla":
        live, full = live.any(0, keepdims=True), full.all(0, keepdims=True)
    return live, full
