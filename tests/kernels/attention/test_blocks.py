"""Memory and skipping: what is never materialised, and which tiles are never computed."""

import math

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memtrain_kernels import AttentionSpec, attention
from memtrain_kernels.attention import blocks


def equations(jaxpr):
    """Every equation of a jaxpr and of the jaxprs inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("window", [None, 512])
def test_no_intermediate_grows_with_the_square_of_the_length(window):
    T, D = 32_768, 8
    x = jax.ShapeDtypeStruct((1, T, 1, D), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def loss(q, k, v, positions, segments):
        out, lse = attention(
            q,
            k,
            v,
            spec=AttentionSpec(window=window, ordered=True),
            q_positions=positions,
            kv_positions=positions,
            q_segments=segments,
            kv_segments=segments,
            return_lse=True,
        )
        return out.sum() + lse.sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, x, x, tokens, tokens)
    sizes = [
        math.prod(getattr(var.aval, "shape", ()))
        for eqn in equations(jaxpr.jaxpr)
        for var in eqn.outvars
        if hasattr(var.aval, "shape")
    ]
    assert len(sizes) > 100  # the walk reaches into the loops
    assert max(sizes) <= 2 * T * D < T * T // 1000


def count_tiles(q_pos, kv_pos, q_seg, kv_seg):
    """A mask that lets everything through and counts the tiles it is computed for, at run time."""
    jax.debug.callback(_count)
    return q_pos >= q_pos


_tiles: list[None] = []


def _count() -> None:
    _tiles.append(None)


def tiles_computed(spec_options, T, S, **tokens) -> tuple[int, int]:
    """Tiles that forward, and forward with backward, really compute; blocks of 4."""
    spec = AttentionSpec(mask_fn=count_tiles, block_q=4, block_kv=4, **spec_options)
    rng = np.random.default_rng(0)
    draw = lambda n: jnp.asarray(rng.standard_normal((2, n, 1, 4)), jnp.float32)  # noqa: E731
    run = lambda q, k, v: attention(q, k, v, spec=spec, **tokens).sum()  # noqa: E731
    counts = []
    for function in (run, jax.grad(run, (0, 1, 2))):
        compiled = jax.jit(function).lower(draw(T), draw(S), draw(S)).compile()
        _tiles.clear()
        jax.block_until_ready(compiled(draw(T), draw(S), draw(S)))
        jax.effects_barrier()
        counts.append(len(_tiles))
    return counts[0], counts[1]


@pytest.fixture
def looped(monkeypatch):
    monkeypatch.setattr(blocks, "_MAX_UNROLLED", 0)


def test_causal_and_window_skip_by_index(looped):
    assert tiles_computed({"causal": False}, 24, 24) == (36, 72)
    assert tiles_computed({}, 24, 24) == (21, 42)
    # A window of 5 reaches into the diagonal tile and the one before.
    assert tiles_computed({"window": 5}, 24, 24) == (11, 22)
    # Sinks keep the first tile alive as well.
    assert tiles_computed({"window": 5, "sink_tokens": 2}, 24, 24) == (15, 30)


def test_unrolled_computes_only_the_tiles_of_the_mask():
    # Forward takes neighbouring tiles of a query block as one.
    assert tiles_computed({"window": 5}, 24, 24) == (6, 6 + 11)


@pytest.mark.full
def test_packed_documents_skip_by_their_summaries(looped):
    segments = np.repeat(np.arange(3), 8)[None]  # three documents of two blocks each
    tokens = {"q_segments": segments, "kv_segments": segments}
    assert tiles_computed({"causal": False}, 24, 24, **tokens) == (12, 24)
    assert tiles_computed({}, 24, 24, **tokens) == (9, 18)
    padded = np.where(np.arange(24) < 16, segments, -1)
    tokens = {"q_segments": padded, "kv_segments": padded}
    assert tiles_computed({}, 24, 24, **tokens) == (6, 12)


def test_a_tile_is_skipped_only_if_every_row_of_the_batch_skips_it(looped):
    segments = np.stack([np.repeat(np.arange(3), 8), np.zeros(24, int)])
    tokens = {"q_segments": segments, "kv_segments": segments}
    assert tiles_computed({}, 24, 24, **tokens) == (21, 42)


@pytest.mark.full
def test_arbitrary_positions_skip_by_their_summaries():
    # Zigzag: the first and the last quarter of 32 tokens, against the two in the middle.
    positions = np.arange(32)
    mine = np.concatenate([positions[:8], positions[24:]])[None]
    theirs = positions[8:24][None]
    tokens = {"q_positions": mine, "kv_positions": theirs}
    assert tiles_computed({}, 16, 16, **tokens) == (8, 16)
    assert tiles_computed({"window": 9}, 16, 16, **tokens) == (3, 6)


def test_summaries_tell_dead_and_full_tiles():
    """No dead tile has a visible pair, no full one a hidden pair, and both kinds are found."""
    rng = np.random.default_rng(3)
    found = {"dead": 0, "full": 0}
    for _ in range(300):
        causal = bool(rng.integers(2))
        left = int(rng.integers(1, 9)) if rng.integers(2) else None
        right = int(rng.integers(1, 9)) if not causal and rng.integers(2) else None
        spec = AttentionSpec(
            causal=causal,
            window=(left, right),
            sink_tokens=int(rng.integers(0, 3)),
            prefix=int(rng.integers(0, 4)) if rng.integers(2) else 0,
        )
        far = rng.choice([0, 0, 0, 2**30 - 20, 1 - 2**30, 1_500_000_000, -1_500_000_000])
        pos = far + rng.integers(0, 12, (2, 1, 1)) + np.sort(rng.integers(0, 6, (2, 1, 8)))
        seg = rng.integers(-1, 2, (2, 1, 8)) if rng.integers(2) else np.zeros((2, 1, 8), int)
        summaries = [
            blocks.summarise(jnp.asarray(p, jnp.int32), jnp.asarray(s, jnp.int32), 4)
            for p, s in zip(pos, seg, strict=True)
        ]
        q = blocks.Summary(*(x[0, :, None] for x in summaries[0]))
        kv = blocks.Summary(*(x[0, None, :] for x in summaries[1]))
        live, full = blocks.live_tiles(spec, q, kv), blocks.full_tiles(spec, q, kv)
        for i, j in np.ndindex(2, 2):
            pairs = [
                oracle.sees(spec, pos[0, 0, t], pos[1, 0, s], seg[0, 0, t], seg[1, 0, s])
                for t in range(4 * i, 4 * i + 4)
                for s in range(4 * j, 4 * j + 4)
            ]
            if not live[i, j]:
                assert not any(pairs)
                found["dead"] += 1
            if full[i, j]:
                assert all(pairs)
                found["full"] += 1
    assert min(found.values()) > 100, found
