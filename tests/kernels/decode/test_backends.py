"""Choice of backend, its record, errors for people, derivatives, sharding, and merging."""

import logging
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memtrain_kernels import AttentionSpec, announce, attention, compiling_for, merge, partitioned
from memtrain_kernels.decode import (
    backend_counts,
    backends,
    last_backend,
    paged_attention,
    quantize_pages,
    resolve_backend,
    xla,
)
from memtrain_kernels.decode.paging import Pages
from memtrain_kernels.decode.partition import over_devices


Q = jnp.ones((2, 1, 4, 8))
POOL = jnp.arange(6 * 4 * 2 * 8, dtype=jnp.float32).reshape(6, 4, 2, 8) / 100
TABLES = jnp.array([[0, 1, 2], [3, 4, 5]])
LENGTHS = jnp.array([9, 5])
CALL: dict[str, Any] = {
    "q": Q,
    "k_pages": POOL,
    "v_pages": POOL,
    "block_tables": TABLES,
    "lengths": LENGTHS,
}
INT8, SCALES = quantize_pages(POOL, "int8")


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)


def test_choice_and_record(monkeypatch):
    assert resolve_backend()[0] == "xla" and "automatic" in resolve_backend()[1]
    before = backend_counts().get("reference", 0)
    paged_attention(**CALL, backend="reference")
    assert last_backend() == "reference" and backend_counts()["reference"] == before + 1
    paged_attention(**CALL)
    assert last_backend() == "xla"
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    assert resolve_backend() == ("reference", "forced by MEMTRAIN_DECODE_BACKEND")
    paged_attention(**CALL)
    assert last_backend() == "reference"
    assert resolve_backend("xla")[0] == "xla"  # the argument wins
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "cuda")
    with pytest.raises(ValueError, match=r"MEMTRAIN_DECODE_BACKEND is 'cuda'.*reference, xla, tpu"):
        paged_attention(**CALL)
    with pytest.raises(ValueError, match="backend argument is 'cuda'"):
        paged_attention(**CALL, backend="cuda")
    with pytest.raises(ValueError, match=r"'tpu', which cannot serve this call: runs on tpu, this"):
        paged_attention(**CALL, backend="tpu")


def test_what_no_chip_has_run_is_not_chosen_by_itself():
    with compiling_for("tpu", "TPU v6 lite"):
        name, reason = resolve_backend()
        assert name == "xla" and "tpu: " in reason
        assert not backends.is_verified("tpu", "TPU v6 lite")
        assert resolve_backend("tpu")[0] == "tpu"
    assert backends.is_verified("xla", "cpu")


def test_the_choice_is_logged_once_a_reason(monkeypatch, caplog):
    monkeypatch.setattr(announce, "_announced", set())
    with caplog.at_level(logging.INFO, logger="memtrain_kernels"):
        paged_attention(**CALL)
        paged_attention(**CALL)
        paged_attention(**CALL, backend="reference")
    assert [r.getMessage() for r in caplog.records] == [
        "decode backend: xla (automatic: block after block of pages, serves every device and "
        "every call)",
        "decode backend: reference (forced by the backend argument)",
    ]


def test_it_runs_without_flax_or_pallas():
    code = """
import sys
for name in ("flax", "memtrain", "jaxtyping", "jax.experimental.pallas"):
    sys.modules[name] = None
import jax.numpy as jnp
from memtrain_kernels.decode import last_backend, paged_attention
x = jnp.ones((3, 4, 2, 8))
out = paged_attention(x[:1, :1], x, x, jnp.zeros((1, 2), int), jnp.array([5]))
assert out.shape == (1, 1, 2, 8) and last_backend() == "xla"
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("decode backend: xla (automatic") == 1


def test_derivatives_are_refused_by_xla_and_given_by_reference():
    def loss(q, pool, backend):
        out = paged_attention(q, pool, POOL, TABLES, LENGTHS, backend=backend)
        return jnp.sum(out * jnp.arange(8.0))

    with pytest.raises(NotImplementedError, match=r"'xla' has no derivative.*backend='reference'"):
        jax.grad(loss)(Q, POOL, "xla")
    ours = jax.grad(loss, argnums=(0, 1))(Q, POOL, "reference")

    def dense(q, pool):
        k, v = pool[TABLES].reshape(2, 12, 2, 8), POOL[TABLES].reshape(2, 12, 2, 8)
        arguments: dict[str, Any] = {
            "q_positions": LENGTHS[:, None] - 1,
            "kv_segments": jnp.where(jnp.arange(12) < LENGTHS[:, None], 0, -1),
        }
        return jnp.sum(attention(q, k, v, backend="xla", **arguments) * jnp.arange(8.0))

    for mine, theirs in zip(ours, jax.grad(dense, argnums=(0, 1))(Q, POOL), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_pages_and_other_keys_join_under_one_softmax():
    """The last tokens in pages, those before as a plain call's keys: as if all were in pages."""
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.standard_normal((1, 20, 2, 8)), jnp.float32) for _ in range(2))
    q = jnp.asarray(rng.standard_normal((1, 1, 4, 8)), jnp.float32)
    paged = lambda x: jnp.pad(x[0], ((0, 4), (0, 0), (0, 0))).reshape(6, 4, 2, 8)  # noqa: E731
    sink = jnp.array([0.1, 1.0, -2.0, 3.0])
    table = jnp.arange(6)[None]
    whole = paged_attention(
        q, paged(k), paged(v), table, jnp.array([20]), sink_logits=sink, return_lse=True
    )
    before = attention(q, k[:, :12], v[:, :12], spec=AttentionSpec(causal=False), return_lse=True)
    pages = (paged(k)[3:], paged(v)[3:], table[:, :3], jnp.array([8]))
    joined = paged_attention(q, *pages, sink_logits=sink, prior=before, return_lse=True)
    by_hand = merge(before, paged_attention(q, *pages, return_lse=True))
    for a, b in zip(whole, joined, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    no_sink = paged_attention(q, paged(k), paged(v), table, jnp.array([20]), return_lse=True)
    for a, b in zip(no_sink, by_hand, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_kernels_run_on_each_devices_rows_and_heads():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    seen = []

    def spy(q, pages, spec, num_splits):
        seen.append((q.shape, pages.k_PSKD.shape, pages.tables_BM.shape, pages.v_scales.shape))
        return xla.attend(q, pages, spec, num_splits)

    pages = Pages(INT8, INT8, TABLES, LENGTHS, SCALES, jnp.tile(SCALES, (6, 1)))
    expected = xla.attend(Q, pages, AttentionSpec(), None)
    with partitioned(mesh, batch=("data",), heads=("model",)):
        ours = jax.jit(lambda q, pages: over_devices(spy)(q, pages, AttentionSpec(), None))(
            jax.device_put(Q, NamedSharding(mesh, PartitionSpec("data", None, "model"))), pages
        )
    assert seen == [((1, 1, 2, 8), (6, 4, 1, 8), (1, 3), (6, 1))]
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": Q[0]}, r"q has shape \(1, 4, 8\): give \[batch, queries, heads, head_dim\]"),
        ({"q": Q.astype(jnp.int32)}, "q has dtype int32: give float32"),
        ({"k_pages": POOL[0]}, r"k_pages has shape \(4, 2, 8\): give \[pages, page_size"),
        ({"v_pages": POOL.astype(jnp.int16)}, "v_pages has dtype int16: give"),
        ({"v_pages": POOL.astype(jnp.bfloat16)}, "float32, bfloat16: give one dtype"),
        ({"k_pages": POOL[..., :4]}, "k_pages has head_dim 4 and q 8"),
        ({"v_pages": POOL[:5]}, r"v_pages has shape \(5, 4, 2, 8\)"),
        ({"q": jnp.ones((2, 1, 3, 8))}, "q has 3 heads and k_pages 2"),
        ({"block_tables": TABLES[:1]}, r"block_tables has shape \(1, 3\): give \[2, max_pages\]"),
        ({"block_tables": TABLES * 1.0}, "block_tables has dtype float32: give int32"),
        ({"lengths": LENGTHS[:, None]}, r"lengths has shape \(2, 1\): give \[2\]"),
        ({"lengths": LENGTHS * 1.0}, "lengths has dtype float32: give int32"),
        ({"lengths": LENGTHS - 6}, "lengths are -1 to 3: give 0 to 12"),
        ({"lengths": LENGTHS + 4}, "lengths are 9 to 13: give 0 to 12, what 3 pages of 4"),
        ({"block_tables": TABLES + 2}, "pages 2 to 6 within lengths: give 0 to 5"),
        ({"block_tables": TABLES - 1}, "pages -1 to 3 within lengths: give 0 to 5"),
        ({"k_scales": SCALES}, "k_scales are given and k_pages have dtype float32"),
        ({"k_pages": INT8, "v_pages": INT8}, "int8 and k_scales are missing: give"),
        ({"spec": AttentionSpec(ordered=True)}, "ordered=True, block_q=None: leave both out"),
        ({"spec": AttentionSpec(block_kv=6)}, "block_kv is 6: give a multiple of the page_size 4"),
        ({"sink_logits": jnp.ones(3)}, r"sink_logits has shape \(3,\).*\[4\]"),
        ({"prior": (Q, Q)}, "prior has shapes"),
        ({"num_splits": 0}, "num_splits is 0: give an int >= 1"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        paged_attention(**CALL | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (jnp.ones(3), r"v_scales has shape \(3,\): give \[2\] or \[6, 2\]"),
        (jnp.ones(2, jnp.int32), "v_scales has dtype int32: give float32"),
        (jnp.array([1.0, jnp.nan]), "v_scales holds a NaN or an infinity: give finite"),
    ],
)
def test_scales_that_do_not_fit(scales, message):
    call: dict[str, Any] = CALL | {"k_pages": INT8, "v_pages": INT8, "k_scales": SCALES}
    with pytest.raises(ValueError, match=message):
        paged_attention(**call, v_scales=scales)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int32"}, "dtype is int32: give int8 or float8_e4m3fn"),
        ({"pages": POOL[0]}, r"pages has shape \(4, 2, 8\): give"),
        ({"pages": INT8}, "pages has dtype int8: give float32"),
    ],
)
def test_what_cannot_be_quantized(change, message):
    with pytest.raises(ValueError, match=message):
        quantize_pages(**{"pages": POOL, "dtype": "int8"} | change)


def test_inside_jit_what_cannot_be_is_cut():
    """A length beyond the table is the table's, a page beyond the pool the last one."""

    @jax.jit
    def call(lengths, tables):
        return paged_attention(Q, POOL, POOL, tables, lengths)

    cut = jnp.array([[0, 5, 5], [5, 5, 5]])
    ours = call(jnp.array([99, -3]), TABLES * 7)
    expected = paged_attention(Q, POOL, POOL, cut, jnp.array([12, 0]))
    np.testing.assert_array_equal(ours, expected)
