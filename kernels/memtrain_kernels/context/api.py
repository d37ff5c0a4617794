"""Attention whose tokens are sharded over devices: an array function for `jax.shard_map`."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memtrain_kernels.attention.backends import backend_module, record, resolve_backend
from memtrain_kernels.attention.capabilities import Problem
from memtrain_kernels.attention.checks import IntArray, checked
from memtrain_kernels.attention.merge import Partial, join_sink_logits, merge
from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.context.layout import Kind, Layout
from memtrain_kernels.context.members import Members
from memtrain_kernels.context.ring import Ring, Tokens, ring_attention
from memtrain_kernels.context.schedule import Schedule, make_schedule
from memtrain_kernels.context.sinks import gather_sinks


Strategy = Literal["ring", "ulysses", "usp", "all_gather"]
STRATEGIES: tuple[Strategy, ...] = ("ring", "ulysses", "usp", "all_gather")


def context_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis: str,
    layout: Kind = "contiguous",
    strategy: Strategy = "ring",
    ulysses: int | None = None,
    spec: AttentionSpec = AttentionSpec(),  # noqa: B008 (frozen)
    q_positions: IntArray | None = None,
    kv_positions: IntArray | None = None,
    q_segments: IntArray | None = None,
    kv_segments: IntArray | None = None,
    sink_logits: jax.Array | None = None,
    prior: Partial | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> jax.Array | Partial:
    """`attention` of a sequence that is sharded over the devices of a mesh axis.

    For use inside `jax.shard_map`; every array is this device's share. Shapes, segments, sinks,
    prior, results and errors are those of `attention`: q [B, T, H, D], k [B, S, Hkv, D], v
    [B, S, Hkv, Dv] with T and S the tokens of one device. All of the mask API is served by every
    strategy, with gradients, those of the log-sum-exp among them.

    axis: the mesh axis over which tokens are sharded. layout: which tokens a device holds (see
    `Layout`). Positions default to the natural index of each token under it; the promise of
    `spec.ordered` is about the natural order. Causal and window rules leave hops out by index under
    either; under other positions every hop is made, and tiles are skipped by data.

    strategy: "ring" (Liu et al. 2023, arXiv 2310.01889): keys and values travel, one permute a
    hop; "ulysses" (Jacobs et al. 2023, arXiv 2309.14509): all-to-all of heads for
    tokens; "usp" (Fang and Zhao 2024, arXiv 2405.07719): Ulysses in groups of `ulysses` neighbours
    (the most that the heads allow, unless given), a ring over the groups; "all_gather": every
    device gathers all keys and values, and needs the memory for them.

    A carried-in state (keys of earlier calls, spread over the devices in any order) is a `prior`:
    the result of a first call over those keys, with their positions and segments.

    Raises ValueError, also for tokens that the layout cannot split and heads that Ulysses cannot
    divide.
    """
    size = lax.axis_size(axis)
    given = (q_positions, kv_positions, q_segments, kv_segments)
    problem, tokens = checked(q, k, v, spec, given, sink_logits, prior, return_lse)
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r}: there are {', '.join(STRATEGIES)}")
    if ulysses is not None and strategy != "usp":
        raise ValueError(f"ulysses={ulysses} is for strategy 'usp', this is {strategy!r}")
    whole = Layout(layout, size)
    whole.check(problem.T * size)
    whole.check(problem.S * size, "keys")
    tokens = Tokens(*tokens)
    if strategy == "all_gather":
        o, lse = _gathered(q, k, v, tokens, spec, whole, Members(axis, size), backend)
    else:
        group = ulysses_degree(strategy, size, problem.H, problem.K, ulysses)
        o, lse = _exchanged(q, k, v, tokens, spec, whole, Members(axis, size, group), backend)
    if prior is not None:
        o, lse = merge((o, lse), (prior[0].astype(o.dtype), prior[1].astype(lse.dtype)))
    if sink_logits is not None:
        o, lse = join_sink_logits((o, lse), sink_logits)
    out = o.astype(q.dtype)
    return (out, lse) if return_lse else out


def ulysses_degree(
    strategy: Strategy, size: int, num_heads: int, num_kv_heads: int, asked: int | None = None
) -> int:
    """Devices that exchange heads with each other. Raises ValueError where heads do not divide."""
    if strategy in ("ring", "all_gather"):
        return 1
    most = math.gcd(size, num_heads, num_kv_heads)
    degree = size if strategy == "ulysses" else asked or most
    if size % degree or num_heads % degree or num_kv_heads % degree:
        fits = [d for d in range(1, most + 1) if most % d == 0]
        instead = f"; strategy 'usp' with ulysses={most} fits" if strategy == "ulysses" else ""
        raise ValueError(
            f"strategy {strategy!r} over {degree} of {size} devices cannot divide {num_heads} "
            f"query and {num_kv_heads} key heads: degrees that fit are {', '.join(map(str, fits))}"
            f"{instead}"
        )
    return degree


def plan_ring(
    spec: AttentionSpec,
    layout: Layout,
    q_local: int,
    kv_local: int,
    *,
    by_default: bool,
    segments: bool,
) -> tuple[Schedule, bool]:
    """The hops of a call on a ring, and whether sink tokens are gathered apart.

    by_default: positions are natural indices. segments: whether they are given.
    """
    if layout.devices == 1:
        return Schedule(1, (), complete=True), False
    by_index = by_default or (spec.ordered and not spec.prefix)
    make = lambda spec, by_index: make_schedule(spec, layout, q_local, kv_local, by_index)  # noqa: E731
    schedule = make(spec, by_index)
    if spec.window_left is None or not spec.sink_tokens or not by_index:
        return schedule, False
    right = None if spec.causal else (None, spec.window_right)
    unbounded = make(dataclasses.replace(spec, window=right, sink_tokens=0), by_index)
    same = np.array_equal(schedule.visited(layout.pieces), unbounded.visited(layout.pieces))
    if same and schedule.tail is None:
        return schedule, False
    # Only of stretches whose documents stand together is it known whose sinks matter further on.
    together = spec.ordered or not segments
    if layout.kind == "striped" or not together:
        return unbounded, False
    return schedule, True


def _exchanged(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tokens: Tokens,
    spec: AttentionSpec,
    layout: Layout,
    members: Members,
    backend: str | None,
) -> Partial:
    """The ring over groups, between two exchanges of heads inside them."""
    group = members.group
    ring_layout = layout.grouped(group)
    by_default = tokens.q_pos is None and tokens.kv_pos is None
    if group > 1:
        q, k, v = (layout.join(members.heads_for_tokens(x), group) for x in (q, k, v))
        joined = (
            None if x is None else layout.join(members.gather_group(x), group) for x in tokens
        )
        tokens = Tokens(*joined)
    segments = tokens.q_seg is not None or tokens.kv_seg is not None
    T, S = q.shape[1], k.shape[1]
    schedule, sinks_apart = plan_ring(
        spec, ring_layout, T, S, by_default=by_default, segments=segments
    )
    name, attend = _chosen(q, k, v, spec, backend, schedule, tokens)
    same_tokens = spec.ordered or (by_default and not segments and T == S)
    ring = Ring(spec, ring_layout, members, schedule, name, same_tokens)
    o, lse = ring_attention(q, k, v, tokens, ring)
    if sinks_apart:
        own = ring_layout.indices(members.rank(), S)[None]
        B = k.shape[0]
        q_pos = (
            ring_layout.indices(members.rank(), T)[None] if tokens.q_pos is None else tokens.q_pos
        )
        kv_pos = own if tokens.kv_pos is None else tokens.kv_pos
        q_seg = jnp.zeros((1, T), jnp.int32) if tokens.q_seg is None else tokens.q_seg
        kv_seg = jnp.zeros((1, S), jnp.int32) if tokens.kv_seg is None else tokens.kv_seg
        kv_pos, kv_seg = (jnp.broadcast_to(x, (B, S)) for x in (kv_pos, kv_seg))
        far = gather_sinks(k, v, kv_pos, kv_seg, spec.sink_tokens, ring_layout, members, schedule)
        plain = dataclasses.replace(spec, ordered=False)
        met = attend(q, far.k, far.v, q_pos, far.positions, q_seg, far.segments, plain)
        o, lse = merge((o, lse), met)
    if group > 1:
        o, lse = (members.tokens_for_heads(layout.part(x, group)) for x in (o, lse))
    return o, lse


def _gathered(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tokens: Tokens,
    spec: AttentionSpec,
    layout: Layout,
    members: Members,
    backend: str | None,
) -> Partial:
    """Attention of own queries to the keys of all devices, which are gathered first."""
    n, T, S = members.size, q.shape[1], k.shape[1]
    q_pos, kv_pos, q_seg, kv_seg = tokens
    gather = lambda x: lax.all_gather(x, members.axis, axis=1, tiled=True)  # noqa: E731
    if q_pos is None:
        q_pos = layout.indices(members.rank(), T)[None]
    if kv_pos is None:
        kv_pos = jnp.asarray(np.concatenate([layout.indices(r, S) for r in range(n)]))[None]
    else:
        kv_pos = gather(kv_pos)
    kv_seg = None if kv_seg is None else gather(kv_seg)
    plain = dataclasses.replace(spec, ordered=False)
    _, attend = _chosen(q, k, v, spec, backend, None, tokens)
    return attend(q, gather(k), gather(v), q_pos, kv_pos, q_seg, kv_seg, plain)


def _chosen(q, k, v, spec, backend: str | None, schedule: Schedule | None, tokens: Tokens):
    """The backend of every hop, by the shapes of one, and its `attend`."""
    several = schedule is None or bool(schedule.chains)
    problem = Problem.of(
        q,
        k,
        v,
        dataclasses.replace(spec, ordered=False),
        positions=several or tokens.q_pos is not None or tokens.kv_pos is not None,
        segments=several or tokens.q_seg is not None or tokens.kv_seg is not None,
        lse=True,
    )
    name, reason = resolve_backend(backend, problem)
    if name == "cudnn":
        why = "cudnn gives no gradients of a part of the keys"
        if reason.startswith("forced"):
            raise ValueError(f"backend 'cudnn' cannot serve a sequence over devices: {why}")
        name, reason = "xla", f"automatic; {why}"
    record(name, reason)
    return name, backend_module(name).attend
