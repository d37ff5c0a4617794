"""Which pages are read, and pages of 8 bits."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import paged_oracle as oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtrain_kernels.attention import AttentionSpec
from memtrain_kernels.decode import paged_attention, quantize_pages
from memtrain_kernels.decode.paging import live_pages


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=4),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from([(0, 0), (3, 0), (0, 11), (20, 5)]),
)
def test_live_pages_are_those_with_a_seen_token(lengths, T, page_size, window, low):
    """And those of the sinks and the prefix, seen or not; in order; none twice."""
    sinks, prefix = low
    spec = AttentionSpec(window=window, sink_tokens=sinks, prefix=prefix)
    live = live_pages(spec, jnp.array(lengths, jnp.int32), T, page_size)
    index = jnp.broadcast_to(jnp.arange(64), (len(lengths), 64))
    places = np.asarray(live.to_page(index))
    for row, length in enumerate(lengths):
        expected = {pos // page_size for pos in range(min(length, max(sinks, prefix)))}
        for q_pos in range(max(length - T, 0), length):
            expected |= {p // page_size for p in range(length) if oracle.sees(spec, q_pos, p)}
        assert places[row, : int(live.count[row])].tolist() == sorted(expected)


def test_without_a_window_every_page_up_to_the_length_is_live():
    live = live_pages(AttentionSpec(sink_tokens=3), jnp.array([0, 1, 16, 17], jnp.int32), 2, 8)
    assert live.count.tolist() == [0, 1, 2, 3] and not live.gap.any()


def test_pages_outside_the_window_are_not_read():
    rng = np.random.default_rng(0)
    cache = oracle.cache(rng, [61, 37], page_size=4, max_pages=16, kv_heads=2, head_dim=8)
    spec = AttentionSpec(window=9, sink_tokens=2)
    q = jnp.asarray(rng.standard_normal((2, 2, 4, 8)), jnp.float32)
    expected = oracle.decode(q, cache, spec)
    for b, length in enumerate([61, 37]):
        far = cache.block_tables[b, 1 : (length - 2 - 8) // 4]  # between sinks and the first window
        assert len(far) >= 5
        cache.k_pages[far] = cache.v_pages[far] = np.nan
    k, v, tables, rows = (jnp.asarray(x) for x in cache[:4])
    for num_splits in (1, 3):
        ours = paged_attention(
            q, k, v, tables, rows, spec=spec, num_splits=num_splits, return_lse=True, backend="xla"
        )
        for mine, theirs in zip(ours, expected, strict=True):
            oracle.close(mine, theirs, 1e-5)


@pytest.mark.parametrize("per_page", [False, True])
@pytest.mark.parametrize(("dtype", "greatest"), [("int8", 127), ("float8_e4m3fn", 448)])
def test_quantized_pages(dtype, greatest, per_page):
    rng = np.random.default_rng(0)
    pages = rng.standard_normal((5, 8, 3, 16)).astype(np.float32)
    pages *= np.array([1e-3, 1, 50])[:, None]
    pages[2, :, 1] = 0
    pages[:, :, 0] *= np.linspace(0.1, 2, 5)[:, None, None]
    stored, scales = quantize_pages(jnp.asarray(pages), dtype, per_page=per_page)
    assert stored.shape == pages.shape and stored.dtype == dtype
    axes = (1, 3) if per_page else (0, 1, 3)
    largest = np.abs(pages).max(axis=axes)
    expected = np.where(largest > 0, largest / greatest, 1)
    np.testing.assert_allclose(scales, expected, rtol=1e-6)
    assert scales.dtype == jnp.float32
    spread = np.asarray(scales, np.float64)
    spread = spread[:, None, :, None] if per_page else spread[:, None]
    back = np.asarray(stored).astype(np.float64) * spread
    # int8 is off by half a step; float8 by half of its last of four bits, or of its least step.
    step = 0.5 if dtype == "int8" else np.maximum(np.abs(pages) / spread / 16, 2.0**-10)
    assert (np.abs(back - pages) <= step * spread * 1.001).all()
    assert np.isfinite(back).all() and np.abs(np.asarray(stored, np.float32)).max() == greatest
    assert not back[2, :, 1].any()


def test_quantized_as_numpy_does_it():
    pages = np.random.default_rng(1).standard_normal((2, 4, 1, 64)).astype(np.float32)
    stored, scales = quantize_pages(jnp.asarray(pages), jnp.float8_e4m3fn)
    expected = (pages / np.asarray(scales)[0]).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(np.asarray(stored, np.float32), expected.astype(np.float32))


def test_what_is_quantized_attends_like_what_it_stands_for():
    """8-bit pages against the numbers that they stood in for: off by their rounding, no more."""
    rng = np.random.default_rng(2)
    cache = oracle.cache(rng, [30, 17], page_size=8, max_pages=4, kv_heads=2, head_dim=32)
    pages = [jnp.nan_to_num(jnp.asarray(x)) for x in cache[:2]]
    rows = (cache.block_tables, cache.lengths)
    q = jnp.asarray(rng.standard_normal((2, 1, 4, 32)), jnp.float32)
    plain = paged_attention(q, pages[0], pages[1], *rows, backend="xla")
    for dtype, bound in (("int8", 0.02), ("float8_e4m3fn", 0.08)):
        for per_page in (False, True):
            (k, ks), (v, vs) = (quantize_pages(x, dtype, per_page=per_page) for x in pages)
            ours = paged_attention(q, k, v, *rows, k_scales=ks, v_scales=vs, backend="xla")
            assert 0 < np.abs(ours - plain).max() < bound * np.abs(plain).max()
