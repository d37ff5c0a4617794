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
    Summary,
    full_tiles,
    live_tiles,
    make_plan,
    pad_tokens,
    summarise,
)
from memtrain_kernels.attention.capabilities import Problem
from memtrain_kernels.attention.masks import fill_defaults
from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.target import current_target


Shaped = jax.Array | jax.ShapeDtypeStruct
IntArray = jax.Array | np.ndarray


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
    return_lse: bool = False,
    backend: str | None = None,
) -> Explanation:
    """What `attention` would do with these arguments: see `Explanation`.

    q [B, T, H, D], k [B, S, Hkv, D], v [B, S, Hkv, Dv] are arrays or shapes; positions and segments
    are numbers, [B or 1, T or S] or [T or S], as they decide which tiles are skipped. Raises
    ValueError as `attention` does.
    """
    problem = Problem.of(
        q,
        k,
        v,
        spec,
        positions=q_positions is not None or kv_positions is not None,
        segments=q_segments is not None or kv_segments is not None,
        lse=return_lse,
    )
    name, reason = resolve_backend(backend, problem)
    target = current_target()
    block_q, block_kv = block_sizes(name, problem)
    given = (q_positions, kv_positions, q_segments, kv_segments)
    tokens = fill_defaults(
        problem.T,
        problem.S,
        *(None if x is None else jnp.atleast_2d(jnp.asarray(x)) for x in given),
    )
    live, full = _tiles(spec, tokens, block_q, block_kv)
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
    plan = make_plan(
        problem.T,
        problem.S,
        group=problem.H // problem.K,
        by_default=not problem.positions,
        data=problem.positions or problem.segments,
        spec=problem.spec,
    )
    return plan.block_q, plan.block_kv


def _tiles(spec: AttentionSpec, tokens, block_q: int, block_kv: int) -> tuple[np.ndarray, ...]:
    """Live and full tiles: bool [B or 1, num_q, num_kv]; O((T + S) / block) summaries before."""
    q_pos, kv_pos, q_seg, kv_seg = tokens
    q, kv = (
        summarise(pad_tokens(pos, 1, block), pad_tokens(seg, 1, block, fill=-1), block)
        for pos, seg, block in ((q_pos, q_seg, block_q), (kv_pos, kv_seg, block_kv))
    )
    q, kv = Summary(*(x[:, :, None] for x in q)), Summary(*(x[:, None, :] for x in kv))
    live, full = live_tiles(spec, q, kv), full_tiles(spec, q, kv)
    return np.asarray(live), np.asarray(full)
