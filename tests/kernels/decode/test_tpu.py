"""The TPU kernel in both interpreters against the float64 oracle, and its table held to the truth.

One interpreter detects races, reads of memory that nothing wrote and reads out of bounds; it cannot
take references apart by words as the chip does. The other can, and knows nothing of races. Every
case runs in both. No chip has run the kernel; `test_ahead_of_time.py` asks the real compiler.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import paged_oracle as oracle
import pytest
import tpu_cases
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from memtrain_kernels import compiling_for
from memtrain_kernels.attention import AttentionSpec
from memtrain_kernels.decode import paged_attention, tpu
from memtrain_kernels.decode.capabilities import Problem
from memtrain_kernels.decode.paging import Pages


STRICT = pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory="nan",
    out_of_bounds_reads="raise",
    dma_execution_mode="on_wait",
)
INTERPRETERS = {"strict": STRICT, "words": True}
# Blocks of two pages: five, four and three of them, ends inside pages and inside blocks, empty rows
# first, last and in between, a row of one token, one that is shorter than the queries.
LENGTHS = [0, 73, 0, 50, 1, 33, 2, 16, 0]


def run(
    how: str,
    spec: AttentionSpec = AttentionSpec(),  # noqa: B008
    *,
    lengths: list[int] = LENGTHS,
    K: int = 2,
    group: int = 2,
    T: int = 3,
    D: int = 64,
    E: int = 64,
    S: int = 8,
    dtype: str = "float32",
    q_dtype: str = "float32",
    num_splits: int | None = None,
) -> None:
    """One call against the oracle, out and lse."""
    rng = np.random.default_rng(0)
    cache = oracle.cache(
        rng,
        lengths,
        page_size=S,
        max_pages=10,
        kv_heads=K,
        head_dim=D,
        value_dim=E,
        dtype=dtype,
    )
    spec = dataclasses.replace(spec, block_kv=2 * S)
    q = jnp.asarray(rng.standard_normal((len(lengths), T, K * group, D)), q_dtype)
    pages = _pages(cache)
    ours = tpu.attend(q, pages, spec, num_splits, interpret=INTERPRETERS[how])
    if how == "strict":
        jax.block_until_ready(ours)
        assert interpreter.races is not None and not interpreter.races.races_found
    expected = oracle.decode(q, cache, spec)
    assert all(x.dtype == jnp.float32 for x in ours)
    # Products of bfloat16 round the weights; of wider operands they are taken in full.
    oracle.close(ours[0], expected[0], 1e-5 if q_dtype == "float32" else 1e-2)
    oracle.close(ours[1], expected[1], 1e-5)


def _pages(cache: oracle.Cache) -> Pages:
    pool = cache.k_pages.shape[0]
    return Pages(
        jnp.asarray(cache.k_pages),
        jnp.asarray(cache.v_pages),
        jnp.clip(jnp.asarray(cache.block_tables), 0, pool - 1),
        jnp.asarray(cache.lengths),
        None if cache.k_scales is None else jnp.asarray(cache.k_scales),
        None if cache.v_scales is None else jnp.asarray(cache.v_scales),
    )


@pytest.fixture(autouse=True)
def fresh_interpreter():
    yield
    pltpu.reset_tpu_interpret_mode_state()


CASES: dict[str, dict[str, Any]] = {
    "a few queries": {},
    "window, sinks, splits": {
        "spec": AttentionSpec(window=19, sink_tokens=5),
        "num_splits": 2,
        "lengths": [40, 0, 75],
    },
    "not causal, prefix, soft cap, dims differ": {
        "spec": AttentionSpec(causal=False, window=(20, 2), prefix=18, soft_cap=2.0, scale=0.3),
        "D": 256,
        "E": 128,
        "lengths": [61, 0, 17],
    },
    "bfloat16, many rows": {"q_dtype": "bfloat16", "dtype": "bfloat16", "group": 5, "T": 2},
    "bfloat16, heads lie first": {"q_dtype": "bfloat16", "dtype": "bfloat16", "K": 3, "S": 16},
    "int8": {"dtype": "int8", "K": 4, "T": 1},
    "int8, heads lie first": {"dtype": "int8", "K": 1, "lengths": [27, 0, 53]},
    "fp8, window": {"dtype": "float8_e4m3fn", "K": 4, "spec": AttentionSpec(window=30)},
}


@pytest.mark.parametrize("case", CASES)
def test_values(case):
    run("strict", **CASES[case])


# Where tokens come first, references are taken apart by words.
@pytest.mark.parametrize("case", [case for case in CASES if "heads lie first" not in case])
def test_values_by_words(case):
    run("words", **CASES[case])


def _heads_and_dtypes():
    """Each dtype with each number of heads, in one interpreter or the other; slow: in both."""
    dtypes = ["float32", "bfloat16", "int8", "float8_e4m3fn"]
    for (i, dtype), (j, K) in itertools.product(enumerate(dtypes), enumerate([1, 3, 8])):
        for n, how in enumerate(INTERPRETERS):
            covering = (i + j + n) % 2 == 0
            yield pytest.param(
                dtype, K, how, marks=pytest.mark.full if covering else pytest.mark.slow
            )


@pytest.mark.parametrize(("dtype", "K", "how"), list(_heads_and_dtypes()))
def test_heads_and_dtypes(dtype, K, how):
    run(how, dtype=dtype, K=K, group=1, T=2, lengths=[37, 0, 53], D=128, E=256, S=16, num_splits=2)


def test_pages_outside_the_window_are_not_fetched():
    rng = np.random.default_rng(0)
    cache = oracle.cache(rng, [79, 60], page_size=8, max_pages=10, kv_heads=2, head_dim=64)
    spec = AttentionSpec(window=9, sink_tokens=2, block_kv=16)
    q = jnp.asarray(rng.standard_normal((2, 2, 4, 64)), jnp.float32)
    expected = oracle.decode(q, cache, spec)
    for b, length in enumerate([79, 60]):
        far = cache.block_tables[b, 1 : (length - 2 - 8) // 8]
        assert len(far) >= 5
        cache.k_pages[far] = cache.v_pages[far] = np.nan
    for mine, theirs in zip(
        tpu.attend(q, _pages(cache), spec, 1, interpret=STRICT), expected, strict=True
    ):
        oracle.close(mine, theirs, 1e-5)


def test_more_rows_than_one_call_takes(monkeypatch):
    """Rows are worked on in parts where their block tables would fill scalar memory."""
    from memtrain_kernels.decode.tpu import operation

    calls = []

    def spy(call, schedule, *arrays):
        calls.append(schedule.lengths.shape[0])
        return kernel_run(call, schedule, *arrays)

    kernel_run = operation.run
    monkeypatch.setattr(operation, "run", spy)
    monkeypatch.setattr(operation, "_TABLE_BYTES", 4 * 10 * 2)  # of two rows
    run("words", lengths=[20, 0, 11, 37, 5])
    assert calls == [2, 2, 1]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "q of float16": ({"dtype": "float16"}, "q of float16: it takes bfloat16, float32"),
    "pages of float16": ({"pages": "float16"}, "pages of float16: it takes bfloat16, float32, in"),
    "head_dim": ({"D": 96}, "head_dim 96: it takes 64, 128, 256"),
    "value_dim": ({"E": 192}, "value_dim 192: it takes 64, 128, 256"),
    "queries": ({"T": 17}, "17 queries a row: it takes 16 at most"),
    "rows": (
        {"T": 16, "H": 136, "K": 8},
        "2176 query rows of all key heads: it takes 2048 at most",
    ),
    "rows, padded": ({"H": 264, "K": 264}, "2112 query rows of all key heads"),
    "odd page": ({"S": 12}, "page_size 12: it takes multiples of 8"),
    "large page": ({"S": 1032}, "pages of 4227072 bytes: it takes 4194304 at most"),
    "long table": ({"M": 2**17 + 1}, "table of 524292 bytes a row: it takes 524288 at most"),
    "a scale a page": ({"pages": "int8", "per_page": True}, "scales of each page: it takes one a"),
    "mask_fn": ({"spec": AttentionSpec(mask_fn=lambda q, k, a, b: q > k)}, "a mask_fn"),
}


def _lower(arrays, spec: AttentionSpec) -> str:
    def call(q, k, v, tables, lengths, k_scales, v_scales):
        scales = {"k_scales": k_scales, "v_scales": v_scales}
        return paged_attention(q, k, v, tables, lengths, spec=spec, backend="tpu", **scales)

    with compiling_for("tpu", "TPU v5 lite"):
        return jax.jit(call).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("case", tpu_cases.SERVED)
def test_what_the_table_claims_is_lowered(case):
    arrays, spec = tpu_cases.shapes(tpu_cases.SERVED[case])
    assert "tpu_custom_call" in _lower(arrays, spec)


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_table_does_not_claim_is_refused(case):
    change, message = REFUSED[case]
    arrays, spec = tpu_cases.shapes(change)
    with pytest.raises(ValueError, match=f"'tpu', which cannot serve this call: .*{message}"):
        _lower(arrays, spec)
    q, *cache = arrays
    problem = Problem.of(q, Pages(*cache), spec)
    with pytest.raises(ValueError, match=message):
        tpu.attend(q, Pages(*cache), spec, 1)
    assert message in str(tpu.CAPABILITIES.refusal(problem))


def test_a_block_that_does_not_fit_is_refused():
    arrays, _ = tpu_cases.shapes({"M": 400})
    with pytest.raises(ValueError, match=r"block_kv is 4096, .* 16777216 bytes: .* 4194304"):
        _lower(arrays, AttentionSpec(block_kv=4096))


def test_two_cores_take_two_splits():
    from memtrain_kernels.decode.tpu import operation

    kinds = {"TPU v4": 2, "TPU v5": 2, "TPU v5p": 2, "TPU v5 lite": 1, "TPU v6 lite": 1}
    for kind, cores in kinds.items():
        with compiling_for("tpu", kind):
            assert operation.cores() == cores, kind
