"""The automatic choice: tables, verification, the self-check and what it remembers."""

import dataclasses
import json
import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from memtrain_kernels import (
    BACKENDS,
    AttentionSpec,
    attention,
    compiling_for,
    explain,
    resolve_backend,
)
from memtrain_kernels.attention import Capabilities, Problem, backends, self_check, xla
from memtrain_kernels.target import Target, current_target


# The calls of the self-check by the limits that leave the others out.
LONG = {"right_windows": False, "prefix": False, "soft_cap": False}
TWO_SIDED = {"max_tokens": 1000, "prefix": False, "soft_cap": False}
PREFIX = {"max_tokens": 1000, "right_windows": False, "soft_cap": False}
RICH = {"max_tokens": 1000, "right_windows": False, "prefix": False}
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
HERE = Target("gpu", "NVIDIA H100 80GB HBM3", is_here=True)
PLAIN = Problem(1, 64, 64, 4, 2, 128, 128, "bfloat16", AttentionSpec())


def serves_all(name: str, **limits) -> Capabilities:
    return Capabilities(name, platform="gpu", device_kinds=("H100",), **limits)


@pytest.fixture
def on_gpu(monkeypatch, tmp_path):
    """As if on an H100: backend "cudnn" is what `install` makes it."""
    monkeypatch.setenv("MEMTRAIN_CACHE", str(tmp_path))
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " " + DETERMINISTIC)
    monkeypatch.setattr(backends, "current_target", lambda: HERE)
    monkeypatch.setattr(backends, "_CANDIDATES", {"gpu": ("cudnn",)})
    real = backends.backend_module
    checks = []

    def install(attend, **limits):
        def counted(*arguments):
            checks.append(1)
            return attend(*arguments)

        module = SimpleNamespace(CAPABILITIES=serves_all("cudnn", **limits), attend=counted)
        monkeypatch.setattr(
            backends, "backend_module", lambda name: module if name == "cudnn" else real(name)
        )
        self_check._checked.cache_clear()
        checks.clear()
        return checks

    yield install
    self_check._checked.cache_clear()


@pytest.mark.full
def test_a_backend_that_agrees_is_taken_and_the_check_is_remembered(on_gpu, tmp_path):
    checks = on_gpu(xla.attend)
    name, reason = resolve_backend(problem=PLAIN)
    assert name == "cudnn" and "serves this call on NVIDIA H100" in reason
    assert len(checks) == 4  # traced once for each call of the check
    (key,) = json.loads((tmp_path / "self_checks.json").read_text())
    assert key.startswith("cudnn NVIDIA H100 80GB HBM3 bfloat16 128 128 jax ")
    self_check._checked.cache_clear()  # as in the next process
    assert resolve_backend(problem=PLAIN)[0] == "cudnn" and len(checks) == 4


@pytest.mark.parametrize(
    ("spoil", "limits", "calls"),
    [
        ("output", TWO_SIDED, 1),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                ("gradient", PREFIX, 1),
                ("nan", RICH, 1),
                ("lse", RICH, 1),
                ("long", LONG, 1),
                ("soft cap", {}, 4),  # one call of four that is wrong is enough
            )
        ),
    ],
    ids=["output", "gradient", "nan", "lse", "long", "soft cap"],
)
def test_a_backend_that_is_wrong_is_not_taken(on_gpu, spoil, limits, calls):
    def attend(q, k, v, *rest):
        if spoil == "gradient":  # right values, wrong gradient of the keys
            k = jax.lax.stop_gradient(k)
        if spoil == "soft cap":
            rest = (*rest[:4], dataclasses.replace(rest[4], soft_cap=None))
        o, lse = xla.attend(q, k, v, *rest)
        if spoil == "output":
            o = o.at[:, -1].multiply(1.2)
        if spoil == "lse":
            lse = lse.at[:, -1].add(0.01)
        if spoil == "long":  # right over the first tiles of a long row
            o = o.at[:, 2000:].multiply(1.2)
        return o * jnp.nan if spoil == "nan" else o, lse

    checks = on_gpu(attend, **limits)
    name, reason = resolve_backend(problem=PLAIN)
    assert name == "xla" and "self-check of 'cudnn'" in reason and "failed: off by" in reason
    assert len(checks) == calls


@pytest.mark.full
def test_a_backend_that_does_not_compile_is_not_taken(on_gpu):
    def attend(*arguments):
        raise NotImplementedError("no such instruction\nand more")

    on_gpu(attend)
    name, reason = resolve_backend(problem=PLAIN)
    assert name == "xla" and "failed: NotImplementedError: no such instruction" in reason
    assert "\n" not in reason
    # The next process tries again: what could not run may run then.
    self_check._checked.cache_clear()
    on_gpu(xla.attend, **RICH)
    assert resolve_backend(problem=PLAIN)[0] == "cudnn"


def test_cudnn_is_automatic_only_where_it_is_deterministic(on_gpu, monkeypatch):
    on_gpu(xla.attend, verified_on=("*",))
    assert resolve_backend(problem=PLAIN)[0] == "cudnn"
    monkeypatch.setenv("XLA_FLAGS", "")
    name, reason = resolve_backend(problem=PLAIN)
    assert name == "xla" and f"not deterministic unless XLA_FLAGS has {DETERMINISTIC}" in reason
    name, reason = resolve_backend("cudnn", PLAIN)
    assert name == "cudnn" and "not deterministic" in reason


@pytest.mark.full
def test_the_check_runs_while_a_program_is_traced(on_gpu):
    checks = on_gpu(xla.attend, **RICH)

    @jax.jit
    def traced(x):
        assert resolve_backend(problem=PLAIN)[0] == "cudnn"
        return x + 1

    assert traced(jnp.ones(())) == 2 and checks


def test_processes_never_choose_differently(on_gpu, monkeypatch):
    def attend(*arguments):
        raise NotImplementedError("no such instruction")

    on_gpu(attend)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(RuntimeError, match="MEMTRAIN_ATTENTION_BACKEND=xla for the whole job"):
        resolve_backend(problem=PLAIN)


def test_what_is_verified_needs_no_check(on_gpu):
    checks = on_gpu(xla.attend, verified_on=(HERE.device_kind,))
    assert resolve_backend(problem=PLAIN)[0] == "cudnn" and not checks


def test_a_device_that_is_not_here_takes_the_unverified_only_by_force(on_gpu, monkeypatch):
    on_gpu(xla.attend)
    away = HERE._replace(is_here=False)
    monkeypatch.setattr(backends, "current_target", lambda: away)
    name, reason = resolve_backend(problem=PLAIN)
    assert name == "xla" and "not here to check it" in reason
    assert resolve_backend("cudnn", PLAIN)[0] == "cudnn"


REFUSED = {
    "dtype float32": ({"dtypes": ("bfloat16",)}, {"dtype": "float32"}),
    "head_dim 80": ({"head_dims": (64, 128)}, {"head_dim": 80}),
    "value_dim 64": ({"equal_dims": True}, {"value_dim": 64}),
    "window 3": ({"windows": False}, {"spec": AttentionSpec(window=3)}),
    r"window \(None, 3\)": (
        {"right_windows": False},
        {"spec": AttentionSpec(causal=False, window=(None, 3))},
    ),
    "prefix 2": ({"prefix": False}, {"spec": AttentionSpec(prefix=2)}),
    "soft_cap 5.0": ({"soft_cap": False}, {"spec": AttentionSpec(soft_cap=5.0)}),
    "sink_tokens 1": ({"sink_tokens": False}, {"spec": AttentionSpec(sink_tokens=1)}),
    "a mask_fn": ({"mask_fn": False}, {"spec": AttentionSpec(mask_fn=jnp.less)}),
    "4 heads on 2": ({"grouped_heads": False}, {}),
    "positions": ({"positions": False}, {"positions": True}),
    "segments": ({"segments": False}, {"segments": True}),
    "the log-sum-exp": ({"lse": False}, {"lse": True}),
    "32 queries and 64 keys": ({"square": True}, {"T": 32}),
    "64 tokens": ({"max_tokens": 63}, {}),
    "block_q 32: it chooses": ({"block_multiple": None}, {"spec": AttentionSpec(block_q=32)}),
    "block_kv 96: it takes multiples of 128": (
        {"block_multiple": 128},
        {"spec": AttentionSpec(block_kv=96)},
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_forced_backend_that_cannot_serve_is_an_error(on_gpu, words):
    limits, change = REFUSED[words]
    problem = dataclasses.replace(PLAIN, **change)
    on_gpu(xla.attend, verified_on=("*",))
    assert resolve_backend("cudnn", problem)[0] == "cudnn"
    on_gpu(xla.attend, verified_on=("*",), **limits)
    with pytest.raises(ValueError, match=f"'cudnn', which cannot serve this call: {words}") as e:
        resolve_backend("cudnn", problem)
    assert "\n" not in str(e.value) and "'xla' serves" in str(e.value)
    name, reason = resolve_backend(problem=problem)
    assert name == "xla" and "cudnn: " in reason


def test_a_backend_of_another_platform_is_refused():
    x = jnp.ones((1, 8, 2, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="cannot serve this call: runs on gpu, this is cpu"):
        attention(x, x, x, backend="cudnn")
    with compiling_for("gpu", "NVIDIA L4"):
        assert resolve_backend("cudnn")[0] == "cudnn"
    with compiling_for("gpu", "Quadro"), pytest.raises(ValueError, match="this is Quadro"):
        resolve_backend("cudnn")


def test_explain_counts_what_will_run():
    B, T, H, K, D, E = 2, 4096, 4, 2, 64, 32
    shape = lambda heads, dim: jax.ShapeDtypeStruct((B, T, heads, dim), jnp.bfloat16)  # noqa: E731
    arrays = shape(H, D), shape(K, D), shape(K, E)
    block = {"block_q": 256, "block_kv": 512}
    found = explain(*arrays, spec=AttentionSpec(**block), backend="xla")
    # 16 query blocks of 256 see 1, 1, 2, 2, ... 8, 8 key blocks of 512, the last of each in part.
    tiles, partial, all_tiles = 2 * (8 * 9 // 2), 16, 16 * 8
    assert (found.backend, found.verified) == ("xla", True)
    assert (found.block_q, found.block_kv) == (256, 512)
    assert found.skipped_share == pytest.approx(1 - tiles / all_tiles)
    assert found.partial_share == pytest.approx(partial / all_tiles)
    products = 2 * B * H * 256 * 512 * tiles
    assert found.flops_forward == pytest.approx(products * (D + E))
    assert found.flops_backward == pytest.approx(products * (3 * D + 2 * E))
    assert found.bytes_forward == 2 * B * T * (H + K) * (D + E) + 4 * B * T * H
    assert set(found.refusals) == set(BACKENDS) - {"xla"}
    assert found.refusals["reference"] == "" and "runs on gpu" in found.refusals["cudnn"]
    assert "verified  yes" in str(found)


def test_explain_tells_what_xla_computes():
    """Where its tiles are written out, what indices rule out; in loops, what every row skips."""
    x = jax.ShapeDtypeStruct((2, 64, 1, 8), jnp.float32)
    rows = jnp.stack([jnp.repeat(jnp.arange(4), 16), jnp.zeros(64, jnp.int32)])
    tokens = {"q_segments": rows, "kv_segments": rows, "q_positions": jnp.arange(64)}
    ordered = AttentionSpec(block_q=16, block_kv=16, ordered=True)
    assert explain(x, x, x, spec=ordered, **tokens).skipped_share == 6 / 16
    looped = AttentionSpec(causal=False, block_q=16, block_kv=16)
    found = explain(x, x, x, spec=looped, **tokens)
    assert (found.skipped_share, found.partial_share) == (0, 0.75)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": jax.ShapeDtypeStruct((1, 64, 2, 8), jnp.float32)}, "q has 3 heads and k has 2"),
        ({"q_positions": jnp.arange(5)}, r"give \[1, 64\] or \[64\]"),
    ],
)
def test_explain_refuses_what_attention_refuses(change, words):
    x = jax.ShapeDtypeStruct((1, 64, 3, 8), jnp.float32)
    arguments = {"q": x, "k": x, "v": x} | change
    if "k" in change:
        arguments["v"] = change["k"]
    q, k, v = (arguments.pop(n) for n in "qkv")
    with pytest.raises(ValueError, match=words):
        explain(q, k, v, **arguments)


def test_a_sink_or_a_prior_needs_the_log_sum_exp():
    x = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)
    with compiling_for("cuda", "NVIDIA H100"):
        assert explain(x, x, x, backend="cudnn").backend == "cudnn"
        with pytest.raises(ValueError, match="the log-sum-exp: it serves none"):
            explain(x, x, x, backend="cudnn", sink_logits=jnp.zeros(2))


def test_another_target_is_another_program():
    seen = []

    @jax.jit
    def program(x):
        seen.append(current_target().platform)
        return x

    program(1.0)
    with compiling_for("rocm", "MI300"):
        program(1.0)
    program(1.0)
    assert seen == ["cpu", "gpu"]
    with (
        pytest.raises(ValueError, match="platform 'metal': give cpu, gpu"),
        compiling_for("metal", "M4"),
    ):
        pass


def test_explain_reads_segments():
    x = jax.ShapeDtypeStruct((1, 64, 1, 8), jnp.float32)
    segments = jnp.repeat(jnp.arange(4), 16)
    spec = AttentionSpec(causal=False, block_q=16, block_kv=16)
    tokens = {"q_segments": segments, "kv_segments": segments, "q_positions": jnp.arange(64)}
    found = explain(x, x, x, spec=spec, **tokens)
    assert (found.skipped_share, found.partial_share) == (0.75, 0)
