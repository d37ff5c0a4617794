"""The twin of the Hopper decode kernel against the float64 oracle.

The oracle's caches hold NaN (int8: the extremes) wherever nothing may look, and table entries
beyond a length are no page numbers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import paged_oracle as oracle
import pytest

from memtrain_kernels.attention import AttentionSpec
from memtrain_kernels.decode.hopper.operation import attend_by
from memtrain_kernels.decode.paging import Pages


# Of seven tiles a row at most: ragged, empty, shorter than the queries, whole tiles, one token.
LENGTHS = [439, 0, 192, 2, 65, 1]
SHAPE = {"page_size": 64, "max_pages": 8, "kv_heads": 2, "head_dim": 64}


def run(
    spec: AttentionSpec = AttentionSpec(),  # noqa: B008
    *,
    lengths: list[int] = LENGTHS,
    T: int = 3,
    group: int = 2,
    dtype: str = "float32",
    pages: str = "float32",
    num_splits: int | None = 3,
    per_page: bool = False,
    q_times: float = 1.0,
    **shape: Any,
) -> tuple[jax.Array, jax.Array]:
    """One call of the twin, held to the oracle."""
    rng = np.random.default_rng(0)
    shape = SHAPE | shape
    cache = oracle.cache(rng, lengths, **shape, dtype=pages, per_page=per_page)
    H, P = shape["kv_heads"] * group, cache.k_pages.shape[0]
    q = q_times * rng.standard_normal((len(lengths), T, H, shape["head_dim"]))
    q = jnp.asarray(q, dtype)
    # As paged_attention hands them on: every table entry is some page.
    tables = np.clip(cache.block_tables, 0, P - 1)
    held = Pages(*jax.tree.map(jnp.asarray, cache._replace(block_tables=tables)))
    o, lse = attend_by("twin", q, held, spec, num_splits)
    assert o.dtype == lse.dtype == jnp.float32
    expected_o, expected_lse = oracle.decode(q, cache, spec)
    # Exponentials are rounded to 16 bits before they meet the values; nothing else is. Times the
    # scale of a page they need the range of bfloat16.
    rounded = "bfloat16" if per_page and dtype == "float16" else dtype
    oracle.close(o, expected_o, {"float32": 3e-6, "bfloat16": 4e-3, "float16": 5e-4}[rounded])
    oracle.close(lse, expected_lse, 3e-6)
    return o, lse


CASES: dict[str, dict[str, Any]] = {
    "one query": {"T": 1, "num_splits": 1},
    "a few queries": {},
    "everything at once": {"spec": AttentionSpec(causal=False), "T": 4},
    "window": {"spec": AttentionSpec(window=100)},
    "window and sinks": {"spec": AttentionSpec(window=90, sink_tokens=5), "page_size": 16},
    "prefix and window": {"spec": AttentionSpec(window=3, prefix=130, sink_tokens=2)},
    "two-sided window": {"spec": AttentionSpec(causal=False, window=(70, 2)), "T": 4},
    "soft cap, scale": {"spec": AttentionSpec(soft_cap=2.0, scale=0.7), "num_splits": 2},
    "negative scale": {"spec": AttentionSpec(scale=-0.3, window=200)},
    "values wider": {"group": 1, "head_dim": 8, "value_dim": 16, "page_size": 128},
    "two chunks of queries": {"T": 5, "group": 14, "kv_heads": 1, "lengths": [300, 4, 130]},
    "chunks of wide values": {"T": 3, "group": 12, "value_dim": 160, "lengths": [200, 70, 0]},
    "int8": {"pages": "int8", "dtype": "bfloat16"},
    "int8, scales a page": {
        "pages": "int8", "per_page": True, "dtype": "float16", "page_size": 16, "T": 1,
    },
    "fp8": {"pages": "float8_e4m3fn", "dtype": "bfloat16", "spec": AttentionSpec(window=150)},
    "fp8, scales a page": {
        "pages": "float8_e4m3fn", "per_page": True, "page_size": 32,
        "spec": AttentionSpec(window=90, sink_tokens=40),
    },
    "fp8, large queries": {
        "pages": "float8_e4m3fn", "dtype": "bfloat16", "q_times": 1e6,
        "spec": AttentionSpec(scale=2e-7),
    },
    "fp8, small queries": {
        "pages": "float8_e4m3fn", "dtype": "bfloat16", "q_times": 1e-9,
        "spec": AttentionSpec(scale=2e8),
    },
    "bfloat16": {"pages": "bfloat16", "dtype": "bfloat16", "page_size": 256, "T": 1},
    "float16": {"pages": "float16", "dtype": "float16", "page_size": 8, "lengths": [200, 9, 64]},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_twin_equals_the_oracle(case: str) -> None:
    options = {"max_pages": -(-480 // CASES[case].get("page_size", 64))} | CASES[case]
    run(**options)


def test_splits_change_rounding_alone() -> None:
    spec = AttentionSpec(window=300, sink_tokens=70)
    one, _ = run(spec, num_splits=1)
    for num_splits in (2, 7, 100):
        several, _ = run(spec, num_splits=num_splits)
        np.testing.assert_allclose(one, several, atol=3e-6)


def test_every_row_empty() -> None:
    o, lse = run(lengths=[0, 0], num_splits=2)
    assert not o.any() and bool((lse == -jnp.inf).all())
