"""Choice of backend, its record, errors for people, and independence from everything but jax."""

import logging
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from memtrain_kernels import (
    AttentionSpec,
    announce,
    attention,
    backend_counts,
    last_backend,
    resolve_backend,
)
from memtrain_kernels.attention import backends


X = jnp.ones((1, 4, 2, 8))


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)


def test_choice_and_record(monkeypatch):
    assert resolve_backend()[0] == "xla" and "automatic" in resolve_backend()[1]
    before = backend_counts().get("reference", 0)
    attention(X, X, X, backend="reference")
    assert last_backend() == "reference" and backend_counts()["reference"] == before + 1
    attention(X, X, X)
    assert last_backend() == "xla"
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    assert resolve_backend()[0] == "reference"
    assert backends.ENVIRONMENT_VARIABLE in resolve_backend()[1]
    attention(X, X, X)
    assert last_backend() == "reference"
    assert resolve_backend("xla")[0] == "xla"  # the argument wins
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "cuda")
    with pytest.raises(ValueError, match=r"MEMTRAIN_ATTENTION_BACKEND is 'cuda'.*reference, xla"):
        attention(X, X, X)
    with pytest.raises(ValueError, match=r"backend argument is 'triton'.*reference, xla"):
        attention(X, X, X, backend="triton")


def test_the_choice_is_logged_once_a_reason(monkeypatch, caplog):
    monkeypatch.setattr(announce, "_announced", set())
    with caplog.at_level(logging.INFO, logger="memtrain_kernels"):
        attention(X, X, X)
        attention(X, X, X)
        attention(X, X, X, backend="reference")
    assert [r.getMessage() for r in caplog.records] == [
        "attention backend: xla (automatic: blockwise, serves every device and every spec)",
        "attention backend: reference (forced by the backend argument)",
    ]


def test_it_runs_without_flax_or_memtrain_and_prints_its_choice():
    code = """
import sys
for name in ("flax", "memtrain", "jaxtyping", "optax"):
    sys.modules[name] = None
import jax, jax.numpy as jnp
from memtrain_kernels import AttentionSpec, attention, last_backend, merge
x = jnp.ones((1, 4, 2, 8))
grad = jax.grad(lambda q: attention(q, x, x, spec=AttentionSpec(window=2)).sum())(x)
assert grad.shape == x.shape and last_backend() == "xla"
assert not [m for m in sys.modules if m.split(".")[0] in ("flax", "memtrain") and sys.modules[m]]
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("memtrain_kernels: attention backend: xla (automatic") == 1


def test_second_derivatives_are_refused_by_xla_and_given_by_reference():
    def loss(q, backend):
        return jnp.sum(attention(q, X, X * jnp.arange(8.0), backend=backend) ** 2)

    second = jax.grad(lambda q, backend: jnp.sum(jax.grad(loss)(q, backend) ** 2))
    q = X * jnp.arange(1, 5)[None, :, None, None] / 7
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        second(q, "xla")
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        jax.jit(lambda q: second(q, "xla"))(q)
    assert jnp.isfinite(second(q, "reference")).all()


def test_first_derivatives_through_remat_and_scan():
    spec = AttentionSpec(block_q=2, block_kv=2)

    def loss(q, remat):
        layer = lambda x, k: (attention(x, k, k, spec=spec), None)  # noqa: E731
        layer = jax.checkpoint(layer) if remat else layer
        return jnp.sum(jax.lax.scan(layer, q, jnp.stack([X, 2 * X]))[0] * jnp.arange(8.0))

    q = X * jnp.arange(1, 5)[None, :, None, None] / 7
    plain, remat = (jax.jit(jax.grad(loss), static_argnums=1)(q, r) for r in (False, True))
    assert jnp.allclose(plain, remat, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": X[0]}, r"q has shape \(4, 2, 8\): give \[batch, tokens, heads, head_dim\]"),
        ({"q": X.astype(jnp.int32)}, "q has dtype int32: give a floating dtype"),
        ({"k": X.astype(jnp.bfloat16)}, "float32, bfloat16, float32: give one dtype"),
        ({"k": X[..., :4]}, r"k has shape \(1, 4, 2, 4\)"),
        ({"v": X[:, :3]}, r"v has shape \(1, 3, 2, 8\)"),
        ({"q": jnp.ones((1, 4, 3, 8))}, "q has 3 heads and k has 2"),
        ({"q": X[:, :0]}, "empty attention"),
        ({"q_positions": jnp.arange(5)}, r"q_positions has shape \(5,\): give \[1, 4\] or \[4\]"),
        ({"kv_segments": jnp.ones((1, 4))}, "kv_segments has dtype float32: give int32"),
        ({"q": X.astype(jnp.float8_e4m3fn)}, "q has dtype float8_e4m3fn: give a floating dtype"),
        ({"q_positions": [2**32, 0, 0, 0]}, "q_positions reaches 4294967296: give less than 2"),
        ({"sink_logits": jnp.ones(2, jnp.int32)}, "sink_logits has dtype int32"),
        ({"sink_logits": jnp.ones(3)}, r"sink_logits has shape \(3,\).*\[2\]"),
        ({"prior": (X, X)}, "prior has shapes"),
        ({"q": X[:, :3], "spec": AttentionSpec(ordered=True)}, "q has 3 and k has 4"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(change, message):
    arguments = {"q": X, "k": X, "v": X} | change
    q, k, v = (arguments.pop(n) for n in "qkv")
    with pytest.raises(ValueError, match=message) as error:
        attention(q, k, v, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"window": 0},
        {"window": 2.5},
        {"window": (3, 0)},
        {"window": (3, 2)},
        {"window": (1, 2, 3), "causal": False},
        {"prefix": -1},
        {"prefix": 2**30},
        {"window": 2**31},
        {"causal": "no"},
        {"soft_cap": True},
        {"scale": "a"},
        {"block_q": 0},
        {"block_kv": True},
        {"sink_tokens": -1},
        {"soft_cap": 0.0},
        {"soft_cap": float("nan")},
        {"scale": float("nan")},
        {"mask_fn": 3},
    ],
)
def test_a_spec_that_describes_no_attention_is_refused(fields):
    with pytest.raises(ValueError, match=f"AttentionSpec.{next(iter(fields))} is"):
        AttentionSpec(**fields)
