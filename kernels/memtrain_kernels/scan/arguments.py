"""What the gated delta rule is given: checked, and brought into one form.

Dimensions: B rows, T tokens, G key heads, H = G R value heads, K key_dim, V value_dim.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from memtrain_kernels.varying import vary_alike


LEAST_LOG_DECAY = -15.0
"""Log decays count as no less: a token then keeps 3e-7 of what it could have forgotten. So the
sums over a few tokens stay within what float32 has exponents for (see `channel_decay`)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Run:
    """A run of tokens that changes nothing where it is invalid.

    query, key: [B, T, G, K], the query scaled. value: [B, T, H, V], times what is written of it.
    log_decay: [B, T, H] or [B, T, H, K]. erase: None, [B, T, H] or [B, T, H, K]. starts: [B, T].
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    log_decay: jax.Array
    erase: jax.Array | None
    starts: jax.Array

    @property
    def by_channel(self) -> bool:
        return self.log_decay.ndim == 4

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """[B, H, K, V]."""
        return (self.query.shape[0], self.value.shape[2], self.query.shape[3], self.value.shape[3])


def run_of(
    query: Any,
    key: Any,
    value: Any,
    *,
    log_decay: Any,
    erase: Any,
    write: Any,
    starts: Any,
    valid: Any,
    scale: float | None,
) -> Run:
    """The run, in float32 or wider. Raises ValueError for shapes and dtypes that do not fit."""
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"{name} has shape {x.shape}: give [B, T, heads, dim]")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {x.dtype}: give a floating dtype")
    if key.shape != query.shape:
        raise ValueError(f"key has shape {key.shape}: give that of query, {query.shape}")
    (B, T, G, K), (H, V) = query.shape, value.shape[2:]
    if value.shape[:2] != (B, T):
        raise ValueError(f"value has shape {value.shape}: give [{B}, {T}, heads, dim]")
    if H % G:
        raise ValueError(f"value has {H} heads: give a multiple of query's {G}")
    dtype = jnp.promote_types(jnp.result_type(query, key, value), jnp.float32)
    log_decay = _by_head("log_decay", log_decay, (B, T, H), K, dtype)
    erase = _by_head("erase", erase, (B, T, H), K, dtype)
    write = _by_head("write", write, (B, T, H), V, dtype)
    flags = {"starts": starts, "valid": valid}
    for name, x in flags.items():
        if x is not None and (x.shape != (B, T) or x.dtype != bool):
            raise ValueError(f"{name} is {x.dtype}{list(x.shape)}: give bool [{B}, {T}]")
    starts = jnp.zeros((B, T), bool) if starts is None else jnp.asarray(starts)
    value = value.astype(dtype)
    if write is not None:
        value = value * (write if write.ndim == 4 else write[..., None])
    if log_decay is None:
        log_decay = jnp.zeros((B, T, H), dtype)
    log_decay = jnp.maximum(log_decay, LEAST_LOG_DECAY)
    query = query.astype(dtype) * (K**-0.5 if scale is None else scale)
    key = key.astype(dtype)
    if valid is not None:
        valid = jnp.asarray(valid)
        starts = starts & valid
        real = lambda x: jnp.where(valid.reshape(B, T, *[1] * (x.ndim - 2)), x, 0)  # noqa: E731
        query, key, value, log_decay = (real(x) for x in (query, key, value, log_decay))
        erase = None if erase is None else real(erase)
    return Run(*vary_alike(query, key, value, log_decay, erase, starts))


def _by_head(name: str, x: Any, shape: tuple[int, ...], dim: int, dtype: Any) -> Any:
    """x as [B, T, H] or [B, T, H, dim], or None."""
    if x is None:
        return None
    x = jnp.asarray(x)
    if x.shape not in (shape, (*shape, dim)):
        raise ValueError(f"{name} has shape {x.shape}: give {shape} or {(*shape, dim)}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {x.dtype}: give a floating dtype")
    return x.astype(dtype)
