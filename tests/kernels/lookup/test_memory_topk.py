"""Exact top-k against all scores in NumPy float64: picks, ties, masks, layouts, stored keys."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import lookup_oracle as oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrain_kernels.lookup import memory_topk, search, topk
from memtrain_kernels.target import compiling_for


def every_third_is_hidden(q_pos, kv_pos, q_seg, kv_seg):
    return ((q_pos + kv_pos + q_seg) % 3 != 1) & (kv_pos <= 2 * q_pos + 5 + kv_seg)


@dataclass(frozen=True)
class Case:
    """A shape class and what is asked of it: three blocks of keys at least, the last one ragged."""

    B: int = 2
    key_batch: int = 2
    T: int = 5
    S: int = 53
    H: int = 4
    K: int = 2
    D: int = 8
    top_k: int = 3
    block_queries: int | None = 2
    block_keys: int | None = 16
    positions: str = "default"  # or "each row's own", "one for all"
    segments: str = "none"  # or "both", "queries", "keys"
    masked: bool = False
    dtype: str = "float32"
    platform: str = "cpu"  # whose form of the search: lane by lane on CPU, side by side elsewhere


SHAPES = (
    Case(),
    # Wide enough for groups; the tail of 491 keys is padded to whole groups.
    Case(B=1, key_batch=1, T=3, S=1515, H=2, K=1, top_k=3, block_keys=512, block_queries=None),
    # One key set for a batch, more picks than a block has keys.
    Case(key_batch=1, T=3, S=29, H=2, K=2, top_k=11, block_keys=7),
)


def draw(case: Case, seed: int, ties: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments for memory_topk and for the oracle. Small whole numbers tie a lot, exactly."""
    rng = np.random.default_rng(seed)

    def values(*shape):
        return rng.integers(-2, 3, shape) if ties else rng.standard_normal(shape)

    stored = case.dtype in ("int8", "float8_e4m3fn")
    q = jnp.asarray(values(case.B, case.T, case.H, case.D), "float32" if stored else case.dtype)
    keys = values(case.key_batch, case.S, case.K, case.D) * (9 if case.dtype == "int8" else 1)
    keys = jnp.asarray(np.rint(keys) if case.dtype == "int8" else keys, case.dtype)
    ours: dict[str, Any] = {"queries": q, "keys": keys}
    theirs: dict[str, Any] = {"q": np.asarray(q, np.float64), "keys": np.asarray(keys, np.float64)}
    if stored:
        scales = 2.0 ** rng.integers(-2, 2, (case.key_batch, case.S, case.K))
        ours["key_scales"], theirs["scales"] = jnp.asarray(scales, jnp.float32), scales

    q_pos = np.tile(np.arange(case.T), (case.B, 1))
    kv_pos = np.tile(np.arange(case.S), (case.B, 1))
    if case.positions != "default":
        q_pos = rng.integers(0, case.S, (case.B, case.T))
        kv_pos = np.stack([rng.permutation(2 * case.S)[: case.S] for _ in range(case.B)])
        if case.positions == "one for all":
            q_pos, kv_pos = q_pos[:1].repeat(case.B, 0), kv_pos[:1].repeat(case.B, 0)
        shared = slice(None) if case.positions == "each row's own" else 0
        ours["q_positions"], ours["kv_positions"] = q_pos[shared], kv_pos[shared]
    q_seg, kv_seg = np.zeros_like(q_pos), np.zeros_like(kv_pos)
    if case.segments in ("both", "queries"):
        ours["q_segments"] = q_seg = rng.integers(-1, 3, q_seg.shape)
    if case.segments in ("both", "keys"):
        ours["kv_segments"] = kv_seg = rng.integers(-1, 3, kv_seg.shape)
    mask_fn = every_third_is_hidden if case.masked else None
    theirs |= {"positions": (q_pos, kv_pos), "segments": (q_seg, kv_seg), "mask_fn": mask_fn}
    return ours, theirs


_programs = {}


def run(case: Case, arguments: dict[str, Any]):
    """memory_topk, compiled once a case."""

    def search(arguments):
        with compiling_for(case.platform, "any"):
            return memory_topk(
                **arguments,
                top_k=case.top_k,
                mask_fn=every_third_is_hidden if case.masked else None,
                block_queries=case.block_queries,
                block_keys=case.block_keys,
            )

    if case not in _programs:
        _programs[case] = jax.jit(search)
    return _programs[case](arguments)


FEATURES = (
    {},
    {"positions": "each row's own", "segments": "both", "masked": True},
    {"positions": "one for all", "dtype": "int8"},
    {"segments": "keys", "masked": True, "dtype": "bfloat16"},
    {"positions": "each row's own", "segments": "queries", "dtype": "float8_e4m3fn"},
)
# Every pair would be compiled anew. Side by side matters where there are several batches or heads.
CASES = tuple(
    replace(SHAPES[shape], platform=platform, **FEATURES[features])
    for shape, platform, some in (
        (0, "cpu", (0, 1, 2, 3, 4)),
        (0, "gpu", (1, 2, 4)),
        (1, "cpu", (0, 1, 2)),
        (2, "cpu", (0, 1, 4)),
        (2, "gpu", (1,)),
    )
    for features in some
)


@settings(max_examples=60)
@given(case=st.sampled_from(CASES), seed=st.integers(0, 2**16), ties=st.booleans())
def test_the_picks_are_those_of_all_scores(case, seed, ties):
    ours, theirs = draw(case, seed, ties)
    scores, indices = run(case, ours)
    want_scores, want_indices = oracle.topk(k=case.top_k, **theirs)
    assert scores.dtype == jnp.float32 and indices.dtype == jnp.int32
    if ties:
        np.testing.assert_array_equal(scores, want_scores)
        np.testing.assert_array_equal(indices, want_indices)
        return
    oracle.close(scores, want_scores, 1e-6)
    # Without ties the picks differ only where rounding decides between two scores.
    apart = np.abs(np.diff(np.where(np.isfinite(want_scores), want_scores, -1e9), axis=-1)) > 1e-4
    clear = np.logical_and.accumulate(apart, axis=-1)
    np.testing.assert_array_equal(
        np.asarray(indices)[..., :-1][clear], want_indices[..., :-1][clear]
    )


def test_the_groups_are_used_and_the_cases_have_three_blocks():
    assert topk.group_length(512, 3) == 8 and topk.group_length(491, 3) == 8 and 491 % 8
    for case in SHAPES:
        assert case.block_keys is not None and 2 * case.block_keys < case.S
        assert case.S % case.block_keys


def test_plain_queries_and_keys_of_one_head():
    rng = np.random.default_rng(0)
    q, keys = rng.integers(-3, 4, (6, 5)), rng.integers(-3, 4, (300, 5))
    want = oracle.topk(q[None, :, None], keys[None, :, None], 4)
    find = jax.jit(memory_topk, static_argnums=2)
    scores, indices = find(jnp.asarray(q, jnp.float32), jnp.asarray(keys, jnp.float32), 4)
    np.testing.assert_array_equal(scores, want[0][0, :, 0])
    np.testing.assert_array_equal(indices, want[1][0, :, 0])

    positions = rng.permutation(300)
    segments = rng.integers(0, 2, 300)
    want = oracle.topk(
        q[None, :, None],
        keys[None, :, None],
        4,
        positions=(np.arange(6)[None], positions[None]),
        segments=(np.array([[0, 1, 0, 1, 2, -1]]), segments[None]),
        scales=np.full((1, 300, 1), 0.5),
    )
    scores, indices = find(
        jnp.asarray(q, jnp.bfloat16),
        jnp.asarray(keys, jnp.int8),
        4,
        key_scales=jnp.float32(0.5),
        kv_positions=positions,
        q_segments=np.array([0, 1, 0, 1, 2, -1]),
        kv_segments=segments,
    )
    np.testing.assert_array_equal(scores, want[0][0, :, 0])
    np.testing.assert_array_equal(indices, want[1][0, :, 0])
    assert (np.asarray(indices)[4:] == -1).all() and (np.asarray(scores)[4:] == -np.inf).all()


def test_scales_of_heads_are_those_of_all_their_keys():
    rng = np.random.default_rng(1)
    q = jnp.asarray(rng.standard_normal((1, 3, 4, 8)), jnp.float32)
    keys = jnp.asarray(rng.integers(-99, 100, (1, 40, 2, 8)), jnp.int8)
    heads = np.array([0.25, 3.0], np.float32)
    find = jax.jit(memory_topk, static_argnums=2, static_argnames="block_keys")
    one = find(q, keys, 5, key_scales=jnp.asarray(heads), block_keys=16)
    want = oracle.topk(q, keys, 5, scales=np.broadcast_to(heads, (1, 40, 2)))
    oracle.close(one[0], want[0], 1e-6)
    np.testing.assert_array_equal(one[1], want[1])


def test_a_key_set_in_another_order_gives_the_same_keys_and_scores_to_the_bit():
    rng = np.random.default_rng(2)
    case = Case(S=200, block_keys=64, T=4)
    q = jnp.asarray(rng.standard_normal((2, 4, 4, 8)), jnp.float32)
    keys = rng.standard_normal((2, 200, 2, 8)).astype(np.float32)
    keys[:, 100:] = keys[:, :100]  # every score twice
    segments = np.sort(rng.integers(0, 2, (2, 200)), axis=1)
    weight = jnp.asarray(rng.standard_normal((2, 4, 4, 3)), jnp.float32)

    @jax.jit
    def all_of_it(q, keys, positions, segments):
        def scores(q):
            return memory_topk(
                q,
                keys,
                3,
                kv_positions=positions,
                q_segments=jnp.zeros((2, 4), jnp.int32),
                kv_segments=segments,
                block_queries=case.block_queries,
                block_keys=case.block_keys,
            )

        best, pull, indices = jax.vjp(scores, q, has_aux=True)
        return best, indices, pull(weight)[0]

    positions = np.tile(np.arange(200), (2, 1))
    first = all_of_it(q, keys, positions, segments)
    again = all_of_it(q, keys, positions, segments)
    order = np.stack([rng.permutation(200) for _ in range(2)])
    mixed = all_of_it(
        q, *(np.take_along_axis(x, order.reshape(2, 200, *[1] * (x.ndim - 2)), axis=1)
             for x in (keys, positions, segments))
    )  # fmt: skip
    for one, two, three in zip(first, again, mixed, strict=True):
        np.testing.assert_array_equal(one, two)
        if one.dtype != jnp.int32:
            np.testing.assert_array_equal(one, three)
    slots = np.take_along_axis(order, np.asarray(mixed[1]).reshape(2, -1), axis=1)
    np.testing.assert_array_equal(first[1], slots.reshape(2, 4, 4, 3))
    assert (np.diff(np.asarray(first[0])) == 0).any()  # there are ties


def test_zeros_have_no_sign_and_ties_of_them_go_to_the_first():
    # -1 * 0 is -0: not less than the 0 that comes after it.
    scores, indices = memory_topk(jnp.array([[-1.0]]), jnp.array([[0.0], [-0.0], [0.0]]), 3)
    assert indices.tolist() == [[0, 1, 2]]
    assert not np.signbit(scores).any()


def test_a_nan_counts_as_the_greatest_where_it_is_seen_and_not_at_all_where_it_is_not():
    keys = np.ones((1100, 2), np.float32)  # in groups
    keys[[70, 800]] = np.nan
    keys[10] = 2
    segments = np.where(np.arange(1100) == 800, 1, 0)
    find = jax.jit(
        lambda q: memory_topk(
            q,
            jnp.asarray(keys),
            3,
            q_segments=np.zeros(1, int),
            kv_segments=segments,
            block_keys=512,
        )
    )
    scores, indices = find(jnp.ones((1, 2)))
    assert indices.tolist() == [[70, 10, 0]]
    assert scores.tolist() == [[np.inf, 4.0, 2.0]]


@pytest.fixture
def tiles_run(monkeypatch):
    """One entry for each tile whose scores are asked for, as it runs."""
    calls, products = [], search._products
    monkeypatch.setattr(
        search,
        "_products",
        lambda q, k: (jax.debug.callback(lambda: calls.append(1)), products(q, k))[1],
    )
    return calls


def test_blocks_whose_segments_do_not_meet_are_skipped(tiles_run):
    """A skipped block runs nothing: its scores are never asked for."""
    segments = np.repeat([0, 1, 2, -1], 8)  # shuffled, and put in order by the positions
    order = np.random.default_rng(0).permutation(32)
    q, keys = jnp.ones((2, 3)), jnp.ones((32, 3))
    _, indices = memory_topk(
        q,
        keys,
        2,
        kv_positions=np.arange(32)[order],
        q_segments=np.array([1, 1]),
        kv_segments=segments[order],
        block_keys=8,
    )
    jax.effects_barrier()
    assert len(tiles_run) == 1
    assert order[np.asarray(indices)].tolist() == [[8, 9], [8, 9]]


@dataclass(frozen=True)
class Band:
    """Keys at distances 3 .. 9, from position 2 on; says what it reaches, or not."""

    def __call__(self, q_pos, kv_pos, q_seg, kv_seg):
        return (q_pos - kv_pos >= 3) & (q_pos - kv_pos < 10) & (kv_pos >= 2)


@dataclass(frozen=True)
class KnownBand(Band):
    def reaches(self, q_least, q_most, kv_least, kv_most):
        return (q_most - kv_least >= 3) & (q_least - kv_most < 10) & (kv_most >= 2)


def test_blocks_that_the_mask_does_not_reach_are_skipped_and_nothing_else(tiles_run):
    """One document, and two packed in a row, with holes and with the keys shuffled."""
    rng = np.random.default_rng(5)
    T = 64
    positions = np.array([np.arange(T), [*range(24), *range(40)]], np.int32)
    segments = np.array([[0] * T, [3] * 24 + [4] * 40], np.int32)
    segments[:, 10:13] = segments[0, 60:] = -1
    order = np.array([np.arange(T), rng.permutation(T)])
    at = lambda x: np.take_along_axis(x, order, axis=1)  # noqa: E731
    q = jnp.asarray(rng.normal(size=(2, T, 2, 4)), jnp.float32)
    keys = jnp.asarray(rng.normal(size=(2, T, 1, 4)), jnp.float32)
    found, tiles = [], []
    for mask in (Band(), KnownBand()):
        found.append(
            memory_topk(
                q,
                keys,
                4,
                q_positions=positions,
                q_segments=segments,
                kv_positions=at(positions),
                kv_segments=at(segments),
                mask_fn=mask,
                block_queries=8,
                block_keys=8,
            )
        )
        jax.effects_barrier()
        tiles.append(len(tiles_run))
        tiles_run.clear()
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # Of a row's 8 x 8 tiles a block of queries reaches its own keys and two blocks before them.
    assert tiles[1] <= 2 * (1 + 2 + 6 * 3) < 0.5 * tiles[0]


def test_the_scores_of_all_keys_are_never_held():
    q = jax.ShapeDtypeStruct((256, 16), jnp.float32)
    keys = jax.ShapeDtypeStruct((2**18, 16), jnp.float32)
    find = jax.jit(lambda q, keys: memory_topk(q, keys, 8))
    memory = find.lower(q, keys).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 256 * 2**18 * 4 / 8  # an eighth of the scores
    text = find.lower(q, keys).as_text()
    assert f"256x{2**18}" not in text


def test_float64_stays_float64():
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        q, keys = rng.standard_normal((3, 4)), rng.standard_normal((50, 4))
        find = jax.jit(lambda q, keys: memory_topk(q, keys, 5, block_keys=16))
        scores, indices = find(q, keys)
        want = oracle.topk(q[None, :, None], keys[None, :, None], 5)
        assert scores.dtype == jnp.float64
        np.testing.assert_allclose(scores, want[0][0, :, 0], rtol=1e-14)
        np.testing.assert_array_equal(indices, want[1][0, :, 0])


@pytest.mark.parametrize(("width", "top_k"), [(3, 1), (64, 1), (260, 2), (1000, 5), (4096, 16)])
def test_columns_through_groups_are_those_of_a_stable_sort(width, top_k):
    rng = np.random.default_rng(width)
    best = jax.jit(topk.best_columns, static_argnums=1)
    for rows in (rng.integers(-3, 3, (7, width)), rng.standard_normal((7, width))):
        rows = rows.astype(np.float32)
        want = np.argsort(-rows, axis=-1, kind="stable")[:, :top_k]
        np.testing.assert_array_equal(best(rows, top_k), want)
