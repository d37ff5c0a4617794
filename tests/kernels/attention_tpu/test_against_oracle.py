"""The kernels against float64: the TPU interpreter with race detection, and drawn masks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
import tile_oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from memtrain_kernels.attention import AttentionSpec, tpu


# Reads of memory that nothing wrote, reads out of bounds, and unordered accesses are errors.
STRICT = pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory="nan",
    out_of_bounds_reads="raise",
    dma_execution_mode="on_wait",
)
# Several tiles on every axis; the lengths of the tests are no multiples of it.
TILES: dict[str, Any] = {"block_q": 128, "block_kv": 128}
# bfloat16 rounds the probabilities and the results; float32 is multiplied in full.
TOLERANCE = {"float32": 3e-6, "bfloat16": 2e-2}


def packed(B: int, length: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    segments, positions = tile_oracle.packed(rng, B, length, documents=3, padding=20)
    return positions, positions, segments, segments


NOTHING_GIVEN = (None, None, None, None)
SHUFFLED = np.random.default_rng(1).permutation(300).astype(np.int32)[None]

STRICT_CASES: dict[str, tuple[AttentionSpec, dict[str, Any], tuple]] = {
    "causal": (AttentionSpec(**TILES), {}, NOTHING_GIVEN),
    "packed, window, sinks, soft cap": (
        AttentionSpec(window=60, sink_tokens=3, soft_cap=4.0, **TILES),
        {"B": 2},
        packed(2, 300),
    ),
    "prefix, two-sided window, bfloat16, queries and keys of different lengths": (
        AttentionSpec(causal=False, window=(70, 50), prefix=20, **TILES),
        {"T": 261, "S": 419, "D": 128, "E": 64, "dtype": "bfloat16", "K": 2},
        NOTHING_GIVEN,
    ),
    "positions in any order, mask_fn": (
        AttentionSpec(mask_fn=problems.same_parity, window=200, **TILES),
        {"E": 128},
        (SHUFFLED, SHUFFLED[:, ::-1], None, None),
    ),
}


@pytest.fixture
def interpreter():
    yield STRICT
    pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize("case", STRICT_CASES)
def test_no_races_and_the_numbers(case, interpreter):
    spec, shape, tokens = STRICT_CASES[case]
    inputs, cotangents = problems.arrays(**shape)
    tolerance = TOLERANCE[inputs[0].dtype.name]
    problems.check(inputs, cotangents, tokens, spec, tolerance, interpret=interpreter)


@pytest.mark.full
@pytest.mark.parametrize(
    ("D", "E", "dtype"), [(256, 256, "bfloat16"), (128, 192, "float32"), (64, 256, "bfloat16")]
)
def test_head_dims(D, E, dtype):
    inputs, cotangents = problems.arrays(T=130, S=260, H=4, K=2, D=D, E=E, dtype=dtype)
    # The queries are the last of the keys, as where a sequence is continued.
    tokens = (np.arange(130, 260, dtype=np.int32)[None], None, None, None)
    problems.check(inputs, cotangents, tokens, AttentionSpec(**TILES), TOLERANCE[dtype])


side = st.one_of(st.none(), st.sampled_from([1, 40, 128, 129, 290]))


@st.composite
def specs(draw) -> AttentionSpec:
    causal = draw(st.booleans())
    return AttentionSpec(
        causal=causal,
        window=(draw(side), None if causal else draw(side)),
        prefix=draw(st.sampled_from([0, 0, 5, 150])),
        sink_tokens=draw(st.sampled_from([0, 4, 130])),
        soft_cap=draw(st.sampled_from([None, 2.0])),
        scale=draw(st.sampled_from([None, 0.25])),
        mask_fn=draw(st.sampled_from([None, None, problems.same_parity])),
        block_q=draw(st.sampled_from([128, 256])),
        block_kv=draw(st.sampled_from([128, 256])),
    )


@given(
    specs(),
    st.sampled_from([NOTHING_GIVEN, packed(1, 300), (SHUFFLED, SHUFFLED, None, None)]),
    st.integers(0, 99),
)
@settings(max_examples=6)
def test_drawn_masks(spec, tokens, seed):
    inputs, cotangents = problems.arrays(seed=seed)
    problems.check(inputs, cotangents, tokens, spec, TOLERANCE["float32"])


@pytest.mark.slow
@given(
    specs(),
    st.sampled_from([NOTHING_GIVEN, packed(1, 300), (SHUFFLED, SHUFFLED, None, None)]),
    st.integers(0, 99),
)
@settings(max_examples=30)
def test_many_drawn_masks(spec, tokens, seed):
    inputs, cotangents = problems.arrays(seed=seed)
    problems.check(inputs, cotangents, tokens, spec, TOLERANCE["float32"])


ODD: dict[str, tuple[AttentionSpec, dict[str, int]]] = {
    "one query, everything": (
        AttentionSpec(
            window=40, prefix=9, sink_tokens=4, soft_cap=3.0, mask_fn=problems.same_parity, **TILES
        ),
        {"T": 1, "S": 300, "E": 192, "H": 3, "K": 1},
    ),
    "one key": (AttentionSpec(window=40, prefix=9, **TILES), {"T": 300, "S": 1}),
    "prefix beyond the keys": (
        AttentionSpec(causal=False, window=(None, 2), prefix=200, **TILES),
        {"T": 300, "S": 140, "B": 2, "H": 4, "K": 2},
    ),
    "sinks over two blocks": (
        AttentionSpec(causal=False, window=(1, 1), sink_tokens=130, **TILES),
        {"T": 140, "S": 400, "H": 2, "K": 2},
    ),
    "negative scale": (AttentionSpec(scale=-0.3, soft_cap=1.0, **TILES), {"T": 130, "S": 130}),
    "wide": (
        AttentionSpec(window=60, prefix=3, **TILES),
        {"T": 130, "S": 130, "D": 256, "E": 192, "H": 1},
    ),
    "its own blocks": (AttentionSpec(window=10, sink_tokens=300), {"T": 600, "S": 600, "H": 1}),
}


@pytest.mark.full
@pytest.mark.parametrize("case", ODD)
def test_odd_shapes(case):
    spec, shape = ODD[case]
    inputs, cotangents = problems.arrays(**shape)
    problems.check(inputs, cotangents, NOTHING_GIVEN, spec, TOLERANCE["float32"])


def test_a_nan_stays_a_nan():
    (q, k, v), cotangents = problems.arrays()
    q = q.at[0, 7].set(jnp.nan)
    (out, _), _ = problems.results(
        (q, k, v), cotangents, NOTHING_GIVEN, AttentionSpec(**TILES), interpret=True
    )
    assert np.isnan(out[0, 7]).all()
    assert np.isfinite(out[0, 8:]).all()


def test_rows_that_see_nothing():
    inputs, cotangents = problems.arrays()
    positions = np.arange(300, dtype=np.int32)[None]
    q_seg = np.where(positions < 130, 1, 0).astype(np.int32)
    q_seg[0, 250:] = -1
    kv_seg = np.zeros((1, 300), np.int32)
    spec = AttentionSpec(window=30, **TILES)
    (out, lse), gradients = problems.results(
        inputs, cotangents, (None, None, q_seg, kv_seg), spec, interpret=True
    )
    hidden = q_seg[0] != 0
    assert not np.any(np.asarray(out)[0, hidden])
    assert np.all(np.asarray(lse)[0, hidden] == -np.inf)
    assert np.all(np.isfinite(np.asarray(lse)[0, ~hidden]))
    assert not np.any(np.asarray(gradients[0])[0, hidden])
    assert all(np.all(np.isfinite(x)) for x in gradients)


def test_the_two_oracles_agree():
    spec = AttentionSpec(window=4, sink_tokens=1, soft_cap=2.0)
    inputs, cotangents = problems.arrays(B=2, T=9, S=9, H=4, K=2, D=8, E=4)
    q_pos, kv_pos, q_seg, kv_seg = (
        np.stack([x, x[::-1]])
        for x in (np.arange(9), np.arange(9), np.arange(9) // 4, np.arange(9) // 3)
    )
    q, k, v = inputs
    ours, our_gradients = tile_oracle.dense(
        q, k, v, spec, (q_pos, kv_pos), (q_seg, kv_seg), cotangents
    )
    theirs, their_gradients = tile_oracle.dense_by_pairs(
        q, k, v, spec, (q_pos, kv_pos), (q_seg, kv_seg), cotangents=cotangents
    )
    for a, b in zip(ours, theirs, strict=True):
        tile_oracle.close(a, b, 1e-12)
    for a, name in zip(our_gradients, "qkv", strict=True):
        tile_oracle.close(a, their_gradients[name], 1e-12)


def test_second_derivatives_name_the_backend_that_has_them():
    (q, k, v), _ = problems.arrays(T=128, S=128, H=1)

    def loss(q):
        return jnp.sum(tpu.attend(q, k, v, *NOTHING_GIVEN, AttentionSpec(), interpret=True)[0])

    with pytest.raises(NotImplementedError, match="backend='reference'"):
        jax.jvp(jax.grad(loss), (q,), (q,))
