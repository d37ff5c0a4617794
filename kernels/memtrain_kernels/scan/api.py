"""The gated delta rule, and what a run of it does to any state."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from memtrain_kernels.scan.arguments import Run, run_of
from memtrain_kernels.scan.chunked import chunked
from memtrain_kernels.scan.reference import token_by_token


Backend = Literal["xla", "reference"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaTransition:
    """S -> kept S + sum. kept: [B, H, K, K], or its diagonal [B, H, K] where nothing is erased.
    sum: [B, H, K, V]."""

    kept: Array
    sum: Array

    def then(self, other: DeltaTransition) -> DeltaTransition:
        """This one followed by the other. Associative."""
        diagonal = self.kept.ndim == 3
        kept = other.kept * self.kept if diagonal else _product(other.kept, self.kept)
        return DeltaTransition(kept, other.advance(self.sum))

    def advance(self, state: Array) -> Array:
        """The state after the run, [B, H, K, V]."""
        if self.kept.ndim == 3:
            return self.kept[..., None] * state + self.sum
        return _product(self.kept, state) + self.sum


def gated_delta(
    query: Any,
    key: Any,
    value: Any,
    *,
    log_decay: Any = None,
    erase: Any = None,
    write: Any = None,
    starts: Any = None,
    valid: Any = None,
    state: Any = None,
    scale: float | None = None,
    backend: Backend | None = None,
) -> tuple[Array, Array]:
    """The gated delta rule, whose state is a matrix for each head:

        S[t] = (I - k[t] (b[t] * k[t])^T) diag(exp(g[t])) S[t-1] + k[t] (w[t] * v[t])^T
        out[t] = S[t]^T (scale q[t])

    Gated DeltaNet 2 (arXiv 2605.22791). Its restrictions: one g a head and w = b a number is Gated
    DeltaNet (2412.06464), the same with g by channel Kimi Delta Attention (2510.26692), without g
    DeltaNet (2406.06484); without b gated linear attention (2312.06635) and, with one g a head,
    Mamba-2's state space duality (2405.21060).

    Args:
        query, key: [B, T, G, K]. value: [B, T, H, V], H a multiple of G. Where something is erased,
            keys should be at most of unit length, or the state may grow.
        log_decay: g, 0 or less, [B, T, H] or by key channel [B, T, H, K]; None keeps all. Below -15
            it counts as -15.
        erase: b, [B, T, H] or [B, T, H, K]; None erases nothing.
        write: w, [B, T, H] or [B, T, H, V]; None writes the values as they are.
        starts: bool [B, T], a document begins here: nothing of the one before is left.
        valid: bool [B, T]; other tokens change nothing, and their outputs mean nothing.
        state: [B, H, K, V], float32, from empty where None.
        scale: of the query; K^-0.5 where None.
        backend: "xla" is chunked; "reference" goes token by token, as a single token always does.
    Returns:
        [B, T, H, V] in the value's dtype, and the state after, float32 (float64 for such inputs).
        Sums and the triangular solve are float32 at the highest precision.
    Raises ValueError for shapes and dtypes that do not fit.
    """
    run = run_of(
        query,
        key,
        value,
        log_decay=log_decay,
        erase=erase,
        write=write,
        starts=starts,
        valid=valid,
        scale=scale,
    )
    out, after = _run(run, _entering(run, state), backend)
    return out.astype(jnp.asarray(value).dtype), after


def gated_delta_transition(
    key: Any,
    value: Any,
    *,
    log_decay: Any = None,
    erase: Any = None,
    write: Any = None,
    starts: Any = None,
    valid: Any = None,
    backend: Backend | None = None,
) -> DeltaTransition:
    """What a run of tokens does to any state that enters it. Arguments as of `gated_delta`.

    Where something is erased it costs about as much again as K more value channels: their columns
    follow what becomes of each unit vector.
    """
    run = run_of(
        key,
        key,
        value,
        log_decay=log_decay,
        erase=erase,
        write=write,
        starts=starts,
        valid=valid,
        scale=None,
    )
    B, H, K, V = run.state_shape
    if run.erase is None:
        total = run.log_decay if run.by_channel else run.log_decay[..., None]
        # Of the tokens after which no document begins.
        begun = jnp.cumsum(run.starts, axis=1)
        last = (begun == begun[:, -1:])[..., None, None]
        kept = jnp.exp(jnp.sum(jnp.where(last, total, 0), axis=1))
        kept = jnp.where(begun[:, -1, None, None] > 0, 0, kept)
        _, after = _run(run, _entering(run, None), backend)
        return DeltaTransition(jnp.broadcast_to(kept, (B, H, K)), after)
    zeros = jnp.zeros((*run.value.shape[:3], K), run.value.dtype)
    wider = dataclasses.replace(run, value=jnp.concatenate([run.value, zeros], axis=-1))
    units = jnp.broadcast_to(jnp.eye(K, dtype=run.value.dtype), (B, H, K, K))
    empty = jnp.zeros((B, H, K, V), run.value.dtype)
    _, after = _run(wider, jnp.concatenate([empty, units], axis=-1), backend)
    return DeltaTransition(after[..., V:], after[..., :V])


def _entering(run: Run, state: Any) -> Array:
    if state is None:
        return jnp.zeros(run.state_shape, run.value.dtype)
    state = jnp.asarray(state)
    if state.shape != run.state_shape:
        raise ValueError(f"state has shape {state.shape}: give {run.state_shape}")
    return state.astype(run.value.dtype)


def _run(run: Run, state: Array, backend: Backend | None) -> tuple[Array, Array]:
    if backend not in (None, "xla", "reference"):
        raise ValueError(f"backend={backend!r}: it is 'xla' or 'reference'")
    if backend == "reference" or run.query.shape[1] == 1:
        return token_by_token(run, state)
    return chunked(run, state)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")
