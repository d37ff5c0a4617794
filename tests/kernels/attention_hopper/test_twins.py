"""The twins of the Hopper kernels against the float64 oracle: values, log-sum-exp, gradients."""

from typing import Any, NamedTuple

import hopper_oracle as oracle
import jax
import jax.numpy as jnp
import layouts
import numpy as np
import pytest

from memtrain_kernels import AttentionSpec
from memtrain_kernels.attention.hopper.attend import attend_by


class Shape(NamedTuple):
    """Three blocks of queries and of keys, the last ones ragged."""

    B: int = 2
    T: int = 300
    S: int = 330
    H: int = 4
    K: int = 2
    D: int = 64


class Run(NamedTuple):
    o: Any
    lse: Any
    grads: Any


def run_both(spec: AttentionSpec, shape: Shape, layout: str, dtype: Any) -> tuple[Run, Run]:
    """The twins' results and the oracle's on the same rounded inputs."""
    B, T, S, H, K, D = shape
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), dtype)  # noqa: E731
    q, k, v, d_out = draw(B, T, H, D), draw(B, S, K, D), draw(B, S, K, D), draw(B, T, H, D)
    d_lse = jnp.asarray(rng.standard_normal((B, T, H)), jnp.float32)
    arrays, given = layouts.tokens(layout, B, T, S)
    q_pos, kv_pos, q_seg, kv_seg = (None if x is None else jnp.asarray(x) for x in given)

    @jax.jit
    def run(q, k, v):
        def attend(q, k, v):
            return attend_by("twins", q, k, v, q_pos, kv_pos, q_seg, kv_seg, spec)

        results, pullback = jax.vjp(attend, q, k, v)
        return results, pullback((d_out.astype(jnp.float32), d_lse))

    (o, lse), grads = run(q, k, v)
    assert o.dtype == jnp.float32 and lse.dtype == jnp.float32
    (o_true, lse_true), grads_true = oracle.dense(q, k, v, spec, arrays, d_out, d_lse)
    return Run(o, lse, grads), Run(o_true, lse_true, grads_true)


CASES: dict[str, tuple[AttentionSpec, Shape, str]] = {
    "causal": (AttentionSpec(), Shape(S=300), "default"),
    "all": (AttentionSpec(causal=False), Shape(T=129, S=257), "default"),
    "window": (AttentionSpec(window=40), Shape(T=390, S=390), "default"),
    "window both sides": (AttentionSpec(causal=False, window=(50, 20)), Shape(), "default"),
    "sinks": (AttentionSpec(window=30, sink_tokens=5), Shape(T=520, S=520, H=1, K=1), "default"),
    "prefix": (AttentionSpec(prefix=140, window=16), Shape(T=390, S=390, K=1), "default"),
    "packed": (AttentionSpec(window=60, sink_tokens=3, prefix=2), Shape(S=300), "packed"),
    "shuffled": (AttentionSpec(window=100), Shape(), "shuffled"),
    "zigzag": (AttentionSpec(), Shape(), "zigzag"),
    "soft cap": (AttentionSpec(soft_cap=2.0), Shape(S=300), "packed"),
    "negative scale": (AttentionSpec(scale=-0.2, causal=False), Shape(H=2), "shuffled"),
    "head_dim 128": (AttentionSpec(window=150, soft_cap=5.0), Shape(H=2, D=128), "default"),
    "head_dim 256": (AttentionSpec(window=150), Shape(B=1, H=2, K=1, D=256), "default"),
}


@pytest.mark.parametrize("case", CASES)
def test_float32_twins_equal_the_oracle(case: str) -> None:
    spec, shape, layout = CASES[case]
    ours, theirs = run_both(spec, shape, layout, jnp.float32)
    oracle.close(ours.o, theirs.o, 3e-6)
    oracle.close(ours.lse, theirs.lse, 3e-6)
    for grad, expected in zip(ours.grads, theirs.grads, strict=True):
        oracle.close(grad, expected, 1e-5)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [("causal", jnp.bfloat16), ("packed", jnp.bfloat16), ("soft cap", jnp.float16)],
)
def test_half_precision_stays_within_its_rounding(case: str, dtype: Any) -> None:
    spec, shape, layout = CASES[case]
    ours, theirs = run_both(spec, shape, layout, dtype)
    eps = float(jnp.finfo(dtype).eps)
    oracle.close(ours.o, theirs.o, eps)
    oracle.close(ours.lse, theirs.lse, 1e-5)
    for grad, expected in zip(ours.grads, theirs.grads, strict=True):
        assert grad.dtype == dtype
        oracle.close(grad, expected, 2 * eps)


def test_rows_that_see_nothing() -> None:
    # Queries before every key: zeros, -inf, and no gradient whatever the cotangents are.
    spec, T = AttentionSpec(), 140
    q = jnp.ones((1, T, 1, 64))
    unseen = jnp.arange(T) < 70
    q_pos = jnp.where(unseen, -1, jnp.arange(T))[None].astype(jnp.int32)

    @jax.jit
    def run(cotangent):
        def attend(q, k, v):
            return attend_by("twins", q, k, v, q_pos, None, None, None, spec)

        (o, lse), pullback = jax.vjp(attend, q, q, q)
        rows = jnp.where(unseen, cotangent, 1.0)[None, :, None]
        return o, lse, pullback((jnp.broadcast_to(rows[..., None], o.shape), rows))

    o, lse, grads = run(1.0)
    assert not o[:, :70].any() and bool((lse[:, :70] == -jnp.inf).all())
    assert bool(o[:, 70:].all()) and bool(jnp.isfinite(lse[:, 70:]).all())
    assert not grads[0][:, :70].any()
    for grad, same in zip(grads, run(9.0)[2], strict=True):
        assert bool(jnp.isfinite(grad).all())
        np.testing.assert_array_equal(grad, same)


def test_second_derivatives_name_the_backend_that_has_them() -> None:
    def loss(q):
        return attend_by("twins", q, q, q, None, None, None, None, AttentionSpec())[0].sum()

    q = jnp.ones((1, 8, 1, 64))
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        jax.jvp(jax.grad(loss), (q,), (q,))
