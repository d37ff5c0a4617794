"""Values and gradients of both backends against the float64 oracle: chosen, then drawn cases."""

import dataclasses
from typing import Any, NamedTuple

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrain_kernels import AttentionSpec, attention
from memtrain_kernels.attention import blocks, direct


class Shape(NamedTuple):
    B: int = 2
    T: int = 13
    S: int = 13
    H: int = 4
    K: int = 2
    D: int = 8
    E: int = 8


def every_third(q_pos, kv_pos, q_seg, kv_seg):
    return (q_pos + 2 * kv_pos + q_seg) % 3 != 0


def check(
    spec: AttentionSpec,
    shape: Shape,
    *,
    layout: str = "default",
    sink: bool = False,
    prior: bool = False,
    backend: str = "xla",
    seed: int = 0,
) -> None:
    """One fwd+bwd through jit, out and lse both with cotangents, against the oracle."""
    rng = np.random.default_rng(seed)
    B, T, S, H, K, D, E = shape
    draw = lambda *s: rng.standard_normal(s).astype(np.float32)  # noqa: E731
    arrays = {"q": draw(B, T, H, D), "k": draw(B, S, K, D), "v": draw(B, S, K, E)}
    if sink:
        arrays["sink_logits"] = draw(H)
    if prior:
        arrays["prior_o"], arrays["prior_lse"] = draw(B, T, H, E), draw(B, T, H)
        arrays["prior_lse"][0, ::3] = -np.inf
        arrays["prior_o"][0, ::3] = 0
    tokens, oracle_tokens = _tokens(layout, rng, B, T, S)
    d_out, d_lse = draw(B, T, H, E), draw(B, T, H)

    def run(arrays):
        given_prior = (arrays["prior_o"], arrays["prior_lse"]) if prior else None
        return attention(
            arrays["q"],
            arrays["k"],
            arrays["v"],
            spec=spec,
            sink_logits=arrays.get("sink_logits"),
            prior=given_prior,
            return_lse=True,
            backend=backend,
            **tokens,
        )

    @jax.jit
    def both(arrays):
        results, pullback = jax.vjp(run, arrays)
        return results, pullback((d_out, d_lse))[0]

    with jax.default_matmul_precision("highest"):
        (out, lse), grads = both(arrays)
    assert out.dtype == jnp.float32 and lse.dtype == jnp.float32
    (expected_out, expected_lse), expected = oracle.dense(
        arrays["q"],
        arrays["k"],
        arrays["v"],
        spec,
        *oracle_tokens,
        sink_logits=arrays.get("sink_logits"),
        prior=(arrays["prior_o"], arrays["prior_lse"]) if prior else None,
        cotangents=(d_out, d_lse),
    )
    oracle.close(out, expected_out, 1e-5)
    oracle.close(lse, expected_lse, 1e-5)
    for name, grad in grads.items():
        oracle.close(grad, expected[name], 1e-4)


def _tokens(layout: str, rng, B: int, T: int, S: int):
    """Keyword arguments for attention, and the same for the oracle."""
    q_pos = np.broadcast_to(np.arange(T), (B, T)).astype(np.int32)
    kv_pos = np.broadcast_to(np.arange(S), (B, S)).astype(np.int32)
    q_seg, kv_seg = np.zeros((B, T), np.int32), np.zeros((B, S), np.int32)
    if layout == "default":
        given = {}
    elif layout in ("packed", "padded"):
        q_seg, q_pos = oracle.packed(rng, B, T, documents=3, padding=3 * (layout == "padded"))
        kv_seg, kv_pos = q_seg, q_pos
        given = {"q_segments", "kv_segments", "q_positions", "kv_positions"}
    elif layout == "shuffled":  # arrival order of a ring buffer, a zigzag layout, a far memory
        kv_pos = rng.permuted(kv_pos, axis=1)
        q_pos = (q_pos + S // 2)[:, ::-1].copy()
        q_seg = rng.integers(-1, 2, (B, T)).astype(np.int32)
        kv_seg = rng.integers(-1, 2, (B, S)).astype(np.int32)
        given = {"q_segments", "kv_segments", "q_positions", "kv_positions"}
    elif layout == "segments":
        q_seg = rng.integers(0, 2, (B, T)).astype(np.int32)
        kv_seg = rng.integers(0, 2, (B, S)).astype(np.int32)
        given = {"q_segments", "kv_segments"}
    else:
        raise AssertionError(layout)
    values = {
        "q_positions": q_pos,
        "kv_positions": kv_pos,
        "q_segments": q_seg,
        "kv_segments": kv_seg,
    }
    return {n: values[n] for n in given}, ((q_pos, kv_pos), (q_seg, kv_seg))


SMALL: dict[str, Any] = {
    "block_q": 5,
    "block_kv": 4,
}  # three and four blocks of 13 tokens, both ragged
CASES: dict[str, tuple[AttentionSpec, Shape, dict[str, Any]]] = {
    "causal": (AttentionSpec(**SMALL), Shape(), {}),
    "full": (AttentionSpec(causal=False, **SMALL), Shape(H=2, E=5), {}),
    "window": (AttentionSpec(window=3, **SMALL), Shape(K=1), {}),
    "window of one": (AttentionSpec(window=1, **SMALL), Shape(), {"prior": True}),
    "window, not causal": (
        AttentionSpec(causal=False, window=4, **SMALL),
        Shape(),
        {"layout": "packed"},
    ),
    "sinks": (AttentionSpec(window=3, sink_tokens=2, **SMALL), Shape(), {"sink": True}),
    "packed, ordered, sinks": (
        AttentionSpec(window=3, sink_tokens=2, ordered=True, **SMALL),
        Shape(),
        {"layout": "packed"},
    ),
    "packed, ordered": (AttentionSpec(ordered=True, **SMALL), Shape(), {"layout": "padded"}),
    "packed window": (
        AttentionSpec(window=4, ordered=True, **SMALL),
        Shape(),
        {"layout": "padded", "sink": True, "prior": True},
    ),
    "shuffled": (AttentionSpec(**SMALL), Shape(S=17), {"layout": "shuffled", "prior": True}),
    "shuffled window": (
        AttentionSpec(window=5, sink_tokens=1, soft_cap=2.0, **SMALL),
        Shape(S=17),
        {"layout": "shuffled", "sink": True},
    ),
    "cap, scale, mask": (
        AttentionSpec(soft_cap=1.5, scale=0.7, mask_fn=every_third, **SMALL),
        Shape(E=3),
        {"layout": "segments"},
    ),
    "window, both sides": (
        AttentionSpec(causal=False, window=(4, 3), sink_tokens=1, **SMALL),
        Shape(),
        {},
    ),
    "packed, ordered, window right": (
        AttentionSpec(causal=False, window=(None, 2), ordered=True, **SMALL),
        Shape(),
        {"layout": "padded"},
    ),
    "prefix": (AttentionSpec(prefix=6, **SMALL), Shape(), {}),
    "prefix, window": (AttentionSpec(window=2, prefix=3, **SMALL), Shape(), {"sink": True}),
    "packed, ordered, prefix": (
        AttentionSpec(window=3, prefix=2, ordered=True, **SMALL),
        Shape(),
        {"layout": "padded"},
    ),
    "fewer keys": (AttentionSpec(causal=False, **SMALL), Shape(S=3), {"layout": "shuffled"}),
    "more queries than keys": (AttentionSpec(window=2, **SMALL), Shape(S=6), {}),
    "decode": (AttentionSpec(window=9), Shape(T=1, S=19), {"layout": "shuffled", "sink": True}),
    "one token": (AttentionSpec(), Shape(T=1, S=1, H=1, K=1), {"prior": True}),
}


@pytest.mark.parametrize("options", [{}, {"sink": True, "prior": True}])
@pytest.mark.parametrize("shape", [Shape(T=1, S=19, E=5), Shape(T=2, S=16, H=4, K=1)])
def test_decoding_on_one_device_agrees_with_the_oracle(shape, options, monkeypatch):
    monkeypatch.setattr(direct.jax, "device_count", lambda: 1)
    ran = []
    forward = direct.forward
    monkeypatch.setattr(direct, "forward", lambda *a: ran.append(1) or forward(*a))
    check(AttentionSpec(window=9, soft_cap=3.0), shape, layout="shuffled", **options)
    assert ran


@pytest.mark.parametrize("case", CASES)
def test_xla_agrees_with_the_oracle(case):
    spec, shape, options = CASES[case]
    check(spec, shape, **options)


@pytest.mark.full
@pytest.mark.parametrize(
    "case",
    [
        "full",
        "window",
        "sinks",
        "packed, ordered",
        "packed window",
        "window, both sides",
        "packed, ordered, window right",
        "prefix",
        "prefix, window",
    ],
)
def test_loops_agree_where_tiles_would_be_written_out(case, monkeypatch):
    monkeypatch.setattr(blocks, "_MAX_UNROLLED", 0)
    spec, shape, options = CASES[case]
    check(spec, shape, **options)


@pytest.mark.full
@pytest.mark.parametrize(
    "case", ["shuffled window", "cap, scale, mask", "packed window", "prefix, window"]
)
def test_reference_agrees_with_the_oracle(case):
    spec, shape, options = CASES[case]
    check(spec, shape, backend="reference", **options)


@st.composite
def problems(draw):
    layout = draw(st.sampled_from(["default", "packed", "padded", "shuffled", "segments"]))
    window = draw(st.sampled_from([None, 1, 4, 11]))
    causal = draw(st.booleans())
    spec = AttentionSpec(
        causal=causal,
        window=window if causal else (window, draw(st.sampled_from([None, 1, 3]))),
        sink_tokens=draw(st.sampled_from([0, 2])) if window else 0,
        prefix=draw(st.sampled_from([0, 0, 3])),
        soft_cap=draw(st.sampled_from([None, 3.0])),
        mask_fn=draw(st.sampled_from([None, every_third])),
        ordered=layout in ("packed", "padded") and draw(st.booleans()),
        block_q=draw(st.sampled_from([4, 16])),
        block_kv=draw(st.sampled_from([3, 16])),
    )
    T, S = draw(st.sampled_from([(13, 13), (11, 16), (2, 16)]))
    if layout in ("packed", "padded"):
        T = S = 13
    K, E = draw(st.sampled_from([(4, 8), (2, 8), (1, 4)]))
    options = {
        "layout": layout,
        "sink": draw(st.booleans()),
        "prior": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }
    return spec, Shape(T=T, S=S, K=K, E=E), options, draw(st.booleans())


@pytest.mark.full
@given(problems())
@settings(max_examples=10)
def test_drawn_problems_agree_with_the_oracle(problem):
    spec, shape, options, looped = problem
    with pytest.MonkeyPatch.context() as patch:
        if looped:
            patch.setattr(blocks, "_MAX_UNROLLED", 0)
        check(spec, shape, **options)


def test_ordered_changes_no_result():
    rng = np.random.default_rng(5)
    segments, positions = oracle.packed(rng, 2, 24, documents=4, padding=5)
    positions = positions * 2 + 3  # strictly increasing is all that is promised
    q, k, v = (jnp.asarray(rng.standard_normal((2, 24, 2, 8)), jnp.float32) for _ in range(3))
    spec = AttentionSpec(window=9, sink_tokens=4, block_q=4, block_kv=4)
    run = lambda spec: attention(  # noqa: E731
        q,
        k,
        v,
        spec=spec,
        q_positions=positions,
        kv_positions=positions,
        q_segments=segments,
        kv_segments=segments,
    )
    oracle.close(run(dataclasses.replace(spec, ordered=True)), run(spec), 1e-6)


def test_bfloat16_stays_near_float32():
    rng = np.random.default_rng(1)
    arrays = [jnp.asarray(rng.standard_normal((2, 40, 2, 16)), jnp.bfloat16) for _ in range(3)]
    spec = AttentionSpec(window=17, scale=0.3, block_q=8, block_kv=8)

    def run(*arrays):
        out, lse = attention(*arrays, spec=spec, return_lse=True)
        assert out.dtype == arrays[0].dtype and lse.dtype == jnp.float32
        return jnp.sum(jnp.sin(out.astype(jnp.float32))) + jnp.sum(lse), out

    half = jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(*arrays)
    full = jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(
        *(x.astype(jnp.float32) for x in arrays)
    )
    for ours, theirs in zip(jax.tree.leaves(half), jax.tree.leaves(full), strict=True):
        oracle.close(ours, theirs, 2e-2)


def test_float64_is_not_rounded_to_float32():
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(rng.standard_normal((1, 9, 2, 4))) for _ in range(3))
        out, lse = attention(q, k, v, spec=AttentionSpec(**SMALL), return_lse=True)
    index = np.arange(9)[None]
    zero = np.zeros((1, 9), int)
    expected = oracle.dense(q, k, v, AttentionSpec(), (index, index), (zero, zero))
    oracle.close(out, expected[0], 1e-14)
    oracle.close(lse, expected[1], 1e-14)
