"""What is checked of the arguments of an attention call before anything runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from memtrain_kernels.attention.capabilities import Problem
from memtrain_kernels.attention.merge import Partial
from memtrain_kernels.attention.spec import AttentionSpec


IntArray = jax.Array | np.ndarray
Shaped = jax.Array | jax.ShapeDtypeStruct
Tokens = tuple[jax.Array | None, jax.Array | None, jax.Array | None, jax.Array | None]
_DTYPES = ("float16", "bfloat16", "float32", "float64")


def checked(
    q: Shaped,
    k: Shaped,
    v: Shaped,
    spec: AttentionSpec,
    given: tuple[IntArray | None, ...],
    sink_logits: jax.Array | None,
    prior: Partial | None,
    return_lse: bool,
) -> tuple[Problem, Tokens]:
    """The problem, and positions and segments (of q, of kv; then segments) as int32 [B or 1, .].

    Raises ValueError for what does not fit.
    """
    _check_arrays(q, k, v)
    B, T, H, _ = q.shape
    S, E = k.shape[1], v.shape[3]
    names = ("q_positions", "kv_positions", "q_segments", "kv_segments")
    tokens = tuple(
        _tokens(name, array, B, length)
        for name, array, length in zip(names, given, (T, S, T, S), strict=True)
    )
    if spec.ordered and T != S:
        raise ValueError(
            f"AttentionSpec.ordered promises that q and kv are the same tokens, "
            f"but q has {T} and k has {S}: leave ordered=False"
        )
    _check_extras(sink_logits, prior, B, T, H, E)
    problem = Problem.of(
        q,
        k,
        v,
        spec,
        positions=tokens[0] is not None or tokens[1] is not None,
        segments=tokens[2] is not None or tokens[3] is not None,
        lse=return_lse or prior is not None or sink_logits is not None,
    )
    return problem, tokens  # pyright: ignore[reportReturnType]


def _check_arrays(q: Shaped, k: Shaped, v: Shaped) -> None:
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 4:
            raise ValueError(
                f"{name} has shape {array.shape}: give [batch, tokens, heads, head_dim]"
            )
        if array.dtype.name not in _DTYPES:
            raise ValueError(
                f"{name} has dtype {array.dtype}: give a floating dtype, {', '.join(_DTYPES)}"
            )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}: give one dtype")
    B, _, H, D = q.shape
    if k.shape[0] != B or k.shape[3] != D:
        raise ValueError(
            f"k has shape {k.shape}: for q {q.shape} give [{B}, tokens, kv_heads, {D}]"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has shape {v.shape}: for k {k.shape} give {[*k.shape[:3], 'any']}")
    if k.shape[2] == 0 or H % k.shape[2]:
        raise ValueError(
            f"q has {H} heads and k has {k.shape[2]}: query heads must be a multiple of key heads"
        )
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        raise ValueError(f"empty attention: q {q.shape}, k {k.shape}, v {v.shape}")


def _tokens(name: str, array: IntArray | None, batch: int, length: int) -> jax.Array | None:
    """[length] or [batch, length] integers as [1 or batch, length]; None stays None."""
    if array is None:
        return None
    if not isinstance(array, jax.Array):
        array = np.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {array.dtype}: give int32")
    if isinstance(array, np.ndarray) and array.size and np.abs(array).max() >= 2**30:
        raise ValueError(
            f"{name} reaches {array.flat[np.abs(array).argmax()]}: give less than 2**30"
        )
    if array.shape == (length,):
        array = array[None]
    elif array.shape not in ((batch, length), (1, length)):
        raise ValueError(f"{name} has shape {array.shape}: give [{batch}, {length}] or [{length}]")
    return jnp.asarray(array, jnp.int32)


def _check_extras(
    sink_logits: jax.Array | None, prior: Partial | None, B: int, T: int, H: int, E: int
) -> None:
    if sink_logits is not None:
        if jnp.shape(sink_logits) != (H,):
            raise ValueError(
                f"sink_logits has shape {jnp.shape(sink_logits)}: give one logit a head, [{H}]"
            )
        if not jnp.issubdtype(jnp.result_type(sink_logits), jnp.floating):
            raise ValueError(
                f"sink_logits has dtype {jnp.result_type(sink_logits)}: give a floating dtype"
            )
    if prior is not None:
        o, lse = prior
        if o.shape != (B, T, H, E) or lse.shape != (B, T, H):
            raise ValueError(
                f"prior has shapes o {o.shape}, lse {lse.shape}: "
                f"give o [{B}, {T}, {H}, {E}] and lse [{B}, {T}, {H}]"
            )
