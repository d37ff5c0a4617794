"""Ring attention: keys and values travel round the devices, queries stay.

Every device works on its own keys first. Then keys and values travel as one array, one permute a
hop, and the next hop's permute depends on no arithmetic, so that it runs beside this hop's (Liu et
al. 2023, arXiv 2310.01889). Results of hops are joined by their log-sum-exp in float32. Backward,
each stretch of keys collects its gradient, in float32, from the devices it passes; what it
collected travels one hop behind the keys, beside the arithmetic of the hop after.

Inside `jax.shard_map`, all of it: arrays are one device's share.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memtrain_kernels.attention.backends import backend_module
from memtrain_kernels.attention.delta import delta_of
from memtrain_kernels.attention.merge import merge
from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.context.layout import Layout
from memtrain_kernels.context.members import Members
from memtrain_kernels.context.schedule import Hop, Schedule, carriers, homecoming, moves
from memtrain_kernels.target import current_target
from memtrain_kernels.varying import vary_alike


# More hops than this are a loop: the program must not grow with the slice.
MAX_UNROLLED = 16


@dataclass(frozen=True)
class Ring:
    """What one ring is compiled for. same_tokens: queries and keys are the same tokens, in order,
    which the first hop may make use of."""

    spec: AttentionSpec
    layout: Layout
    members: Members
    schedule: Schedule
    backend: str
    same_tokens: bool


class Tokens(NamedTuple):
    """int32 [B or 1, local tokens] each; None: positions by the layout, one segment."""

    q_pos: jax.Array | None
    kv_pos: jax.Array | None
    q_seg: jax.Array | None
    kv_seg: jax.Array | None


def ring_attention(
    q_BTHD: jax.Array, k_BSKD: jax.Array, v_BSKE: jax.Array, tokens: Tokens, ring: Ring
) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, E] and lse [B, T, H] in float32 (or wider) over the keys of all members."""
    present = [x for x in tokens if x is not None]
    q, k, v, *present = vary_alike(q_BTHD, k_BSKD, v_BSKE, *present)
    rest = iter(present)
    tokens = Tokens(*(x if x is None else next(rest) for x in tokens))
    return _ring(q, k, v, tokens, ring)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ring(q, k, v, tokens: Tokens, ring: Ring):
    return _ring_forward(q, k, v, tokens, ring)[0]


def _ring_forward(q_BTHD, k_BSKD, v_BSKE, tokens: Tokens, ring: Ring):
    view = _View(ring, tokens, q_BTHD.shape[1], k_BSKD.shape[1])
    attend = backend_module(ring.backend).attend
    D = k_BSKD.shape[-1]
    partial = attend(q_BTHD, k_BSKD, v_BSKE, *view.own(), view.own_spec)
    kv_BSKX = jnp.concatenate([k_BSKD, v_BSKE], axis=-1)

    def work(kv, hop: Hop | None, displacement, partial, arriving=None):
        part = attend(q_BTHD, kv[..., :D], kv[..., D:], *view.at(hop, displacement), view.spec)
        # What comes in is to hide behind the kernel: where heads are many, compilers find the merge
        # long enough for it, and send when the kernel is done.
        part, arriving = _both(part, arriving)
        return merge(partial, part), arriving

    for chain in ring.schedule.chains:
        if _is_uniform(ring, chain):
            arriving = view.permute(kv_BSKX, view.shift(1))

            def step(carry, displacement):
                kv, partial = carry
                after = view.permute(kv, view.shift(1))
                partial, after = work(kv, None, displacement, partial, after)
                return (after, partial), None

            # The last hop has nothing to send.
            rest = jnp.arange(1, len(chain), dtype=jnp.int32)
            (kv, partial), _ = lax.scan(step, _both(arriving, partial), rest)
            partial, _ = work(kv, None, jnp.int32(len(chain)), partial)
            continue
        arriving = view.send(view.tails(kv_BSKX), chain, 0)
        for at, hop in enumerate(chain):
            kv, partial = _both(arriving, partial)
            arriving = view.send(kv, chain, at + 1) if at + 1 < len(chain) else None
            partial, arriving = work(kv, hop, hop.displacement, partial, arriving)
    o, lse = partial
    return (o, lse), (q_BTHD, k_BSKD, v_BSKE, tokens, o.astype(q_BTHD.dtype), lse)


def _ring_backward(ring: Ring, residuals, cotangents):
    q_BTHD, k_BSKD, v_BSKE, tokens, o, lse = residuals
    do, dlse = cotangents
    view = _View(ring, tokens, q_BTHD.shape[1], k_BSKD.shape[1])
    gradients = backend_module(ring.backend).gradients
    D = k_BSKD.shape[-1]
    rows = do, lse, delta_of(o, lse, do, dlse)
    # Otherwise the compiler finds that the forward pass made these permutes already, and keeps all
    # that passed through this device: 1.7 GiB for 15 hops on v5e:4x4, against 0.5.
    k_BSKD, v_BSKE, rows = _both(k_BSKD, v_BSKE, rows)
    dq, dk, dv = gradients(q_BTHD, k_BSKD, v_BSKE, *view.own(), view.own_spec, *rows)
    home = jnp.concatenate([dk, dv], axis=-1)
    kv_BSKX = jnp.concatenate([k_BSKD, v_BSKE], axis=-1)

    def work(kv, hop: Hop | None, displacement, dq):
        k, v = kv[..., :D], kv[..., D:]
        found = gradients(q_BTHD, k, v, *view.at(hop, displacement), view.spec, *rows)
        return dq + found[0], jnp.concatenate(found[1:], axis=-1)

    for chain in ring.schedule.chains:
        if _is_uniform(ring, chain):
            kv, dq = _both(view.permute(kv_BSKX, view.shift(1)), dq)
            after = view.permute(kv, view.shift(1))
            dq, collected = work(kv, None, jnp.int32(1), dq)

            def step(carry, displacement):
                kv, collected, dq = carry
                after = view.permute(kv, view.shift(1))
                arrived = view.permute(collected, view.shift(1))
                dq, part = work(kv, None, displacement, dq)
                return (after, arrived + part, dq), None

            rest = jnp.arange(2, len(chain), dtype=jnp.int32)
            (kv, collected, dq), _ = lax.scan(step, _both(after, collected, dq), rest)
            arrived = view.permute(collected, view.shift(1))
            dq, part = work(kv, None, jnp.int32(len(chain)), dq)
            home += view.permute(arrived + part, view.shift(-len(chain)))
            continue
        arriving, collected = view.send(view.tails(kv_BSKX), chain, 0), None
        for at, hop in enumerate(chain):
            kv, collected, dq = _both(arriving, collected, dq)
            if at + 1 < len(chain):
                arriving = view.send(kv, chain, at + 1)
            # What no longer travels came home; the rest goes on.
            arrived = None if collected is None else view.send(collected, chain, at)
            dq, part = work(kv, hop, hop.displacement, dq)
            collected = part if arrived is None else arrived + part
            home = view.settle(home, collected, chain, at)
    grads = dq, home[..., :D], home[..., D:]
    dq, dk, dv = (g.astype(x.dtype) for g, x in zip(grads, residuals[:3], strict=True))
    none = (x if x is None else np.zeros(x.shape, jax.dtypes.float0) for x in tokens)
    return dq, dk, dv, Tokens(*none)  # pyright: ignore[reportArgumentType]


_ring.defvjp(_ring_forward, _ring_backward)


def _both(*arrays: Any) -> tuple:
    """The same, none of it before all of it is there.

    A hop's permutes and its kernels so begin and end together, in a loop or out of it. Without it,
    compilers finish a permute before the kernel that it could hide behind (v5p, v6e: the first), or
    long after (v5e: the gradients of all hops wait for the end). With it, every permute encloses
    a kernel on v5p, v6e and v5e up to 16 chips; from 32 on, v5e's are synchronous in every form
    tried. On GPU the backward pass has two permutes a hop, and XLA must be allowed two in flight:
    xla_gpu_experimental_parallel_collective_overlap_limit=2. `tools/aot ring`, `ring-hopper`.
    """
    return lax.optimization_barrier(arrays)


def _max_unrolled() -> int:
    # XLA on CPU overlaps nothing, and keeps the arrays of hops that are written out: a loop takes
    # half the memory, and a sixth of the time to compile.
    return 1 if current_target().platform == "cpu" else MAX_UNROLLED


def _is_uniform(ring: Ring, chain: tuple[Hop, ...]) -> bool:
    """Whether the chain is long and every hop is like the one before: a loop then."""
    whole = tuple(range(ring.layout.pieces))
    return len(chain) > _max_unrolled() and all(
        hop.displacement == at + 1 and hop.pieces == whole for at, hop in enumerate(chain)
    )


class _View:
    """What one device sees of a ring: tokens by hop, and how arrays travel."""

    def __init__(self, ring: Ring, tokens: Tokens, q_local: int, kv_local: int) -> None:
        self._ring, self._tokens = ring, tokens
        self._q_local, self._kv_local = q_local, kv_local
        members = ring.members
        self._rank = members.rank()
        self.spec = dataclasses.replace(ring.spec, ordered=False)
        self.own_spec = dataclasses.replace(ring.spec, ordered=ring.same_tokens)
        # Small beside keys and values, and their tiles' summaries are wanted early: gathered once.
        several = bool(ring.schedule.chains)
        gather = members.gather if several else lambda x: x[None]
        self._kv_pos = None if tokens.kv_pos is None else gather(tokens.kv_pos)
        self._kv_seg = None if tokens.kv_seg is None else gather(tokens.kv_seg)
        # All receivers of all hops as one table: a device that gets nothing sees nothing.
        self._receives = {
            hop.displacement: np.isin(np.arange(ring.schedule.devices), hop.receivers)
            for chain in ring.schedule.chains
            for hop in chain
        }

    def own(self) -> tuple:
        """Positions and segments of queries, and of the device's own keys."""
        t = self._tokens
        if self._ring.layout.devices == 1:
            return t.q_pos, t.kv_pos, t.q_seg, t.kv_seg
        kv_pos = self._indices(self._kv_local) if t.kv_pos is None else t.kv_pos
        return self._q_pos(), kv_pos, t.q_seg, t.kv_seg

    def at(self, hop: Hop | None, displacement: Any) -> tuple:
        """The same with the keys that are here at a hop; hop None: a looped one, all pieces."""
        t, n = self._tokens, self._ring.schedule.devices
        source = lax.rem(self._rank - displacement + 2 * n, jnp.int32(n))
        if self._kv_pos is None:
            kv_pos = self._ring.layout.indices(source, self._kv_local)[None]
        else:
            kv_pos = lax.dynamic_index_in_dim(self._kv_pos, source, 0, keepdims=False)
        kv_seg = None
        if self._kv_seg is not None:
            kv_seg = lax.dynamic_index_in_dim(self._kv_seg, source, 0, keepdims=False)
        if hop is None:
            receives = jnp.asarray(np.stack(list(self._receives.values())))[displacement - 1]
            partly = not all(rows.all() for rows in self._receives.values())
        else:
            whole = tuple(range(self._ring.layout.pieces))
            kv_pos = self.select(self.tails(kv_pos), whole, hop.pieces)
            if kv_seg is not None:
                kv_seg = self.select(self.tails(kv_seg), whole, hop.pieces)
            receives = jnp.asarray(self._receives[hop.displacement])
            partly = len(hop.receivers) < n
        q_seg = t.q_seg
        if partly:
            kv_seg = jnp.zeros_like(kv_pos) if kv_seg is None else kv_seg
            kv_seg = jnp.where(receives[self._rank], kv_seg, -1)
            q_seg = jnp.zeros((1, self._q_local), jnp.int32) if q_seg is None else q_seg
        return self._q_pos(), kv_pos, q_seg, kv_seg

    def select(self, x: jax.Array, held: tuple[int, ...], wanted: tuple[int, ...]) -> jax.Array:
        """Of an array whose tokens are the pieces `held`, those of the pieces `wanted`."""
        if held == wanted:
            return x
        length = x.shape[1] // len(held)
        at = [held.index(piece) * length for piece in wanted]
        return jnp.concatenate([lax.slice_in_dim(x, a, a + length, axis=1) for a in at], axis=1)

    def tails(self, x: jax.Array) -> jax.Array:
        """Of a device's own tokens, what may travel: all, or the end of each stretch."""
        tail, pieces = self._ring.schedule.tail, self._ring.layout.pieces
        if tail is None:
            return x
        stretches = x.reshape(x.shape[0], pieces, -1, *x.shape[2:])
        ends = stretches[:, :, stretches.shape[2] - tail :]
        return ends.reshape(x.shape[0], pieces * tail, *x.shape[2:])

    def send(self, x: jax.Array, chain: tuple[Hop, ...], at: int) -> jax.Array:
        """Of an array that was held at the hop before, what travels to hop `at` of the chain."""
        n = self._ring.schedule.devices
        held = chain[at - 1].pieces if at else tuple(range(self._ring.layout.pieces))
        pairs = moves(chain, n, at, carriers(chain, n))
        return self.permute(self.select(x, held, chain[at].pieces), pairs)

    def settle(
        self, home: jax.Array, collected: jax.Array, chain: tuple[Hop, ...], at: int
    ) -> jax.Array:
        """`home` with what of `collected` travels no further than hop `at` of the chain."""
        n, d, pieces = self._ring.schedule.devices, chain[at].displacement, chain[at].pieces
        going = chain[at + 1].pieces if at + 1 < len(chain) else ()
        held = carriers(chain, n)
        everything = [(i, (i - d) % n) for i in held[at]]
        stretch = self._kv_local // self._ring.layout.pieces
        if not going and collected.shape[1] == self._kv_local:
            return home + self.permute(collected, everything)
        ending = homecoming(chain, n, at, held)
        for piece in pieces:
            pairs = ending if piece in going else everything
            if not pairs:
                continue
            part = self.permute(self.select(collected, pieces, (piece,)), pairs)
            length = part.shape[1]
            begin = (piece + 1) * stretch - length
            old = lax.slice_in_dim(home, begin, begin + length, axis=1)
            home = lax.dynamic_update_slice_in_dim(home, old + part, begin, axis=1)
        return home

    def shift(self, by: int) -> list[tuple[int, int]]:
        n = self._ring.schedule.devices
        return [(i, (i + by) % n) for i in range(n)]

    def permute(self, x: jax.Array, pairs: list[tuple[int, int]]) -> jax.Array:
        return self._ring.members.permute(x, pairs)

    def _q_pos(self) -> jax.Array:
        t = self._tokens
        return self._indices(self._q_local) if t.q_pos is None else t.q_pos

    def _indices(self, local: int) -> jax.Array:
        return self._ring.layout.indices(self._rank, local)[None]
