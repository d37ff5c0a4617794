"""Values of `reference` and `xla` against the float64 oracle: chosen cases, then drawn ones."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import paged_oracle as oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrain_kernels.attention import AttentionSpec
from memtrain_kernels.decode import paged_attention


BACKENDS = ("reference", "xla")
# More than three pages a row, no length a multiple of a page but one; an empty row, a row that is
# shorter than the queries, and a single token.
LENGTHS = [37, 0, 12, 2, 29, 1]
SHAPE = {"page_size": 4, "max_pages": 12, "kv_heads": 2, "head_dim": 8}


def every_third(q_pos, kv_pos, q_seg, kv_seg):
    return (q_pos + 2 * kv_pos) % 3 != 0


def run(
    backend: str,
    spec: AttentionSpec = AttentionSpec(),  # noqa: B008
    *,
    lengths: list[int] = LENGTHS,
    shape: dict[str, Any] = SHAPE,
    T: int = 3,
    group: int = 2,
    q_dtype: str = "float32",
    sink: bool = False,
    prior: bool = False,
    num_splits: int | None = None,
    seed: int = 0,
    **cache_options: Any,
) -> None:
    """One call under jit against the oracle, out and lse."""
    rng = np.random.default_rng(seed)
    cache = oracle.cache(rng, lengths, **shape, **cache_options)
    B, K, D, E = len(lengths), shape["kv_heads"], shape["head_dim"], cache.v_pages.shape[3]
    q = jnp.asarray(rng.standard_normal((B, T, K * group, D)), q_dtype)
    extras: dict[str, Any] = {}
    if sink:
        extras["sink_logits"] = rng.standard_normal(K * group).astype(np.float32)
    if prior:
        o, lse = rng.standard_normal((B, T, K * group, E)), rng.standard_normal((B, T, K * group))
        o[0, ::2], lse[0, ::2] = 0, -np.inf
        extras["prior"] = (o.astype(np.float32), lse.astype(np.float32))

    @jax.jit
    def call(q, pages, extras):
        return paged_attention(
            q,
            *pages[:4],
            spec=spec,
            k_scales=pages[4],
            v_scales=pages[5],
            num_splits=num_splits,
            return_lse=True,
            backend=backend,
            **extras,
        )

    pages = jax.tree.map(jnp.asarray, tuple(cache))
    out, lse = call(q, pages, extras)
    expected_out, expected_lse = oracle.decode(q, cache, spec, **extras)
    assert out.dtype == q.dtype and lse.dtype == jnp.float32
    # Scores and sums are float32 whatever the inputs; weights and the result are rounded to q's.
    oracle.close(out, expected_out, 1e-5 if q_dtype == "float32" else 1e-2)
    oracle.close(lse, expected_lse, 1e-5)


CASES: dict[str, dict[str, Any]] = {
    "one query": {"T": 1},
    "a few queries": {},
    "many heads on one": {"T": 2, "group": 6},
    "no group, values wider": {"group": 1, "value_dim": 16},
    "window": {"spec": AttentionSpec(window=5)},
    "window of its own token": {"spec": AttentionSpec(window=1), "T": 1},
    "window and sinks": {"spec": AttentionSpec(window=6, sink_tokens=5)},
    "prefix": {"spec": AttentionSpec(window=3, prefix=9, sink_tokens=2)},
    "prefix past the queries": {"spec": AttentionSpec(prefix=40)},
    "not causal": {"spec": AttentionSpec(causal=False), "T": 4},
    "windows on both sides": {"spec": AttentionSpec(causal=False, window=(7, 2)), "T": 4},
    "soft cap and scale": {"spec": AttentionSpec(soft_cap=2.0, scale=0.7)},
    "mask_fn": {"spec": AttentionSpec(mask_fn=every_third, window=11)},
    "sink logits, prior": {"sink": True, "prior": True},
    "prior alone, windows": {"prior": True, "spec": AttentionSpec(window=4)},
    "pages in common": {"shared": 2},
    "int8": {"dtype": "int8"},
    "fp8": {"dtype": "float8_e4m3fn", "spec": AttentionSpec(soft_cap=3.0)},
    "int8, a scale a page": {"dtype": "int8", "per_page": True},
    "fp8, a scale a page": {"dtype": "float8_e4m3fn", "per_page": True, "prior": True},
    "bfloat16": {"dtype": "bfloat16", "q_dtype": "bfloat16"},
    "int8 under bfloat16": {"dtype": "int8", "q_dtype": "bfloat16", "per_page": True},
    "float16 pages under float32": {"dtype": "float16"},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_values(case, backend):
    run(backend, **CASES[case])


@pytest.mark.parametrize(("num_splits", "block_kv"), [(1, 4), (2, 20), (3, 8), (50, 4)])
def test_splits_and_blocks_change_nothing(num_splits, block_kv):
    spec = AttentionSpec(window=17, sink_tokens=3, block_kv=block_kv)
    run("xla", spec, num_splits=num_splits, prior=num_splits == 2)


def test_every_row_empty():
    run("reference", lengths=[0, 0], T=2)
    run("xla", lengths=[0, 0], T=2)
    run("xla", lengths=[0, 0], T=1, sink=True)


@settings(max_examples=8)
@given(st.data())
def test_drawn(data):
    draw = data.draw
    causal = draw(st.booleans())
    left, right = (draw(st.none() | st.integers(1, 30)) for _ in range(2))
    spec = AttentionSpec(
        causal=causal,
        window=(left, None if causal else right),
        sink_tokens=draw(st.integers(0, 9)),
        prefix=draw(st.sampled_from([0, 0, 7])),
        soft_cap=draw(st.sampled_from([None, 4.0])),
    )
    page_size = draw(st.sampled_from([1, 3, 8]))
    lengths = draw(st.lists(st.integers(0, 40), min_size=3, max_size=3))
    run(
        "xla",
        spec,
        lengths=lengths,
        shape={"page_size": page_size, "max_pages": 40, "kv_heads": 2, "head_dim": 4},
        T=draw(st.integers(1, 5)),
        dtype=draw(st.sampled_from(["float32", "int8"])),
        num_splits=draw(st.sampled_from([None, 2])),
        seed=draw(st.integers(0, 9)),
    )
