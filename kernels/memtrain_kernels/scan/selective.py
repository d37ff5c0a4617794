"""The selective scan: a linear recurrence for every channel and every number of its state.

Tokens are read a chunk at a time. Within one, accelerators take all tokens at once, by an
associative scan, which does more work and holds all states of the chunk; a CPU takes them in turn.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from memtrain_kernels.target import current_target
from memtrain_kernels.varying import vary_alike


CHUNK = 64
"""Tokens whose states [B, 64, D, N] are held at once, at the latest in the backward, which computes
them again."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SelectiveTransition:
    """h -> kept h + sum, number by number: both [B, D, N]."""

    kept: Array
    sum: Array

    def then(self, other: SelectiveTransition) -> SelectiveTransition:
        """This one followed by the other. Associative."""
        return SelectiveTransition(*_join((self.kept, self.sum), (other.kept, other.sum)))

    def advance(self, state: Array) -> Array:
        """The state after the run, [B, D, N]."""
        return self.kept * state + self.sum


def selective_scan(
    value: Any,
    step: Any,
    rate: Any,
    key: Any,
    query: Any,
    *,
    starts: Any = None,
    valid: Any = None,
    state: Any = None,
) -> tuple[Array, Array]:
    """The selective scan of Mamba (Gu and Dao 2023, arXiv 2312.00752):

        h[t] = exp(-step[t] rate) h[t-1] + step[t] value[t] key[t]       for each channel
        out[t] = h[t] . query[t]

    Args:
        value, step: [B, T, D], steps 0 or more. rate: [D, N], 0 or more (the paper's -A).
        key, query: [B, T, N] (its B and C).
        starts: bool [B, T], a document begins here: nothing of the one before is left.
        valid: bool [B, T]; other tokens change nothing, and their outputs mean nothing.
        state: [B, D, N], float32, from empty where None.
    Returns:
        [B, T, D] in the value's dtype, and the state after, float32.
    Raises ValueError for shapes that do not fit.
    """
    tokens = _tokens(value, step, rate, key, starts, valid)
    query = jnp.asarray(query)
    if query.shape != tokens["key"].shape:
        raise ValueError(f"query has shape {query.shape}: give that of key, {tokens['key'].shape}")
    B, D, N = (*tokens["value"].shape[::2], tokens["key"].shape[2])
    h = jnp.zeros((B, D, N), jnp.float32) if state is None else jnp.asarray(state, jnp.float32)
    if h.shape != (B, D, N):
        raise ValueError(f"state has shape {h.shape}: give {(B, D, N)}")
    tokens["query"] = query.astype(jnp.float32)
    rate = jnp.asarray(rate, jnp.float32)

    def at_once(h: Array, part: dict[str, Array]) -> tuple[Array, Array]:
        kept, total = lax.associative_scan(_join, _element(part, rate), axis=1)
        states = total + kept * h[:, None]
        return states[:, -1], _read(states, part["query"])

    def token(h: Array, part: dict[str, Array]) -> tuple[Array, Array]:
        kept, new = _element(part, rate)
        h = kept * h + new
        return h, _read(h, part["query"])

    chunk = _in_turn(token) if _is_cpu() else at_once
    out, h = _over_chunks(chunk, h, tokens)
    return out.astype(jnp.asarray(value).dtype), h


def selective_transition(
    value: Any, step: Any, rate: Any, key: Any, *, starts: Any = None, valid: Any = None
) -> SelectiveTransition:
    """What a run of tokens does to any state that enters it. Arguments as of `selective_scan`."""
    tokens = _tokens(value, step, rate, key, starts, valid)
    rate = jnp.asarray(rate, jnp.float32)
    B, D, N = (*tokens["value"].shape[::2], rate.shape[1])
    identity = jnp.ones((B, D, N), jnp.float32), jnp.zeros((B, D, N), jnp.float32)

    def at_once(run: tuple[Array, Array], part: dict[str, Array]) -> tuple[Any, None]:
        kept, total = lax.associative_scan(_join, _element(part, rate), axis=1)
        return _join(run, (kept[:, -1], total[:, -1])), None

    def token(run: tuple[Array, Array], part: dict[str, Array]) -> tuple[Any, None]:
        return _join(run, _element(part, rate)), None

    chunk = _in_turn(token) if _is_cpu() else at_once
    _, run = _over_chunks(chunk, identity, tokens)
    return SelectiveTransition(*run)


def _tokens(
    value: Any, step: Any, rate: Any, key: Any, starts: Any, valid: Any
) -> dict[str, Array]:
    """In float32; steps of 0 where invalid, which change nothing."""
    value, step, key, rate = (jnp.asarray(x) for x in (value, step, key, rate))
    if value.ndim != 3 or 0 in value.shape:
        raise ValueError(f"value has shape {value.shape}: give [B, T, D]")
    (B, T, D), N = value.shape, rate.shape[-1] if rate.ndim else 0
    wanted = {"step": (step, (B, T, D)), "rate": (rate, (D, N)), "key": (key, (B, T, N))}
    for name, (x, shape) in wanted.items():
        if x.shape != shape:
            raise ValueError(f"{name} has shape {x.shape}: give {shape}")
    for name, x in (("starts", starts), ("valid", valid)):
        if x is not None and (x.shape != (B, T) or x.dtype != bool):
            raise ValueError(f"{name} is {x.dtype}{list(x.shape)}: give bool [{B}, {T}]")
    begun = jnp.zeros((B, T), bool) if starts is None else jnp.asarray(starts)
    value, step, key = (x.astype(jnp.float32) for x in (value, step, key))
    if valid is not None:
        real = jnp.asarray(valid)
        begun = begun & real
        value, step, key = (jnp.where(real[..., None], x, 0) for x in (value, step, key))
    value, step, key, begun = vary_alike(value, step, key, begun)
    return {"value": value, "step": step, "key": key, "starts": begun}


def _element(part: dict[str, Array], rate: Array) -> tuple[Array, Array]:
    """Of tokens [...]: what is left of what entered, and what is added, [..., D, N]. Where a
    document begins the factor is 0, so that nothing of another is felt."""
    step = part["step"][..., None]
    decay = jnp.where(part["starts"][..., None, None], 0.0, jnp.exp(-step * rate))
    return decay, step * part["value"][..., None] * part["key"][..., None, :]


def _read(h: Array, query: Array) -> Array:
    """[..., D] of states [..., D, N]: products and sums, as a matrix product would round on some
    devices."""
    return jnp.sum(h * query[..., None, :], axis=-1)


def _is_cpu() -> bool:
    return current_target().platform == "cpu"


def _in_turn(token: Any) -> Any:
    """A function of a chunk, of one of a token."""

    def chunk(carry: Any, part: dict[str, Array]) -> tuple[Any, Any]:
        by_token = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), part)
        carry, out = lax.scan(token, carry, by_token)
        return carry, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), out)

    return chunk


def _over_chunks(chunk: Any, carry: Any, tokens: dict[str, Array]) -> tuple[Any, Any]:
    """(outputs of all tokens, the carry after). Tokens are filled up with some that do nothing."""
    B, T = tokens["starts"].shape
    size = min(T, CHUNK)
    if size == T:
        carry, out = chunk(carry, tokens)
        return out, carry

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, -T % size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0)

    carry, out = lax.scan(jax.checkpoint(chunk), carry, jax.tree.map(cut, tokens))
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :T]  # noqa: E731
    return jax.tree.map(join, out), carry


def _join(first: tuple[Array, Array], then: tuple[Array, Array]) -> tuple[Array, Array]:
    """(kept, sum) of two runs, one after the other."""
    return first[0] * then[0], then[0] * first[1] + then[1]
