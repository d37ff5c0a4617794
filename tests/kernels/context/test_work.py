"""What a ring computes and sends, counted: balance of layouts, hops that a window leaves."""

import math

import jax
import numpy as np
import pytest
from attention_oracle import packed
from jax.sharding import PartitionSpec
from sharded_calls import mesh_of

from memtrain_kernels import AttentionSpec
from memtrain_kernels.attention import looped
from memtrain_kernels.context import Layout, context_attention, ring_work


BLOCK = 128


@pytest.mark.parametrize("devices", [2, 4, 8, 64])
def test_zigzag_is_balanced_where_a_contiguous_ring_is_not(devices):
    causal = AttentionSpec(ordered=True)
    blocks = {"block_q": BLOCK, "block_kv": BLOCK}
    length = 4 * BLOCK * devices
    zigzag = ring_work(causal, Layout("zigzag", devices), length, **blocks)
    contiguous = ring_work(causal, Layout("contiguous", devices), length, **blocks)
    assert zigzag.slowest <= 1.05
    assert sum(zigzag.tiles) == sum(contiguous.tiles) == devices * zigzag.ideal
    # The last device meets all keys, the average one half of them.
    assert contiguous.slowest == pytest.approx(2, rel=1.5 / devices)
    assert contiguous.hops == zigzag.hops == devices - 1


def test_tiles_that_run_are_those_that_are_counted(monkeypatch):
    """On 4 devices, by callbacks in the branches of the backend's loop."""
    devices, length = 4, 8192  # long enough for no tile to be written out
    counts = np.zeros(devices, int)
    count = lambda rank: np.add.at(counts, int(rank), 1)  # noqa: E731
    masked, whole = looped.tiles.masked_scores, looped.tiles.scores

    def counted(scores):
        def call(*arguments):
            jax.debug.callback(count, jax.lax.axis_index("context"))
            return scores(*arguments)

        return call

    monkeypatch.setattr(looped.tiles, "masked_scores", counted(_unwrapped(masked, whole)))
    monkeypatch.setattr(looped.tiles, "scores", counted(whole))
    spec = AttentionSpec(ordered=True, block_q=BLOCK, block_kv=BLOCK)
    rows = PartitionSpec(None, "context")
    attend = jax.shard_map(
        lambda q: context_attention(q, q, q, axis="context", layout="zigzag", spec=spec),
        mesh=mesh_of(devices),
        in_specs=rows,
        out_specs=rows,
        check_vma=False,
    )
    q = np.random.default_rng(0).normal(size=(1, length, 1, 8)).astype(np.float32)
    jax.block_until_ready(jax.jit(attend)(q))
    jax.effects_barrier()
    expected = ring_work(spec, Layout("zigzag", devices), length, block_q=BLOCK, block_kv=BLOCK)
    assert counts.tolist() == list(expected.tiles)
    assert expected.slowest <= 1.05


def _unwrapped(masked, whole):
    """`masked_scores` calls `scores`: counted once, not twice."""

    def call(spec, scaling, q, k, tokens):
        counted = looped.tiles.scores
        looped.tiles.scores = whole
        try:
            return masked(spec, scaling, q, k, tokens)
        finally:
            looped.tiles.scores = counted

    return call


@pytest.mark.parametrize("window", [1, 2, 256, 257, 1000, 2048, 5000])
def test_a_window_leaves_the_hops_that_it_reaches(window):
    devices, local = 8, 512
    spec = AttentionSpec(window=window, ordered=True)
    blocks = {"block_q": 64, "block_kv": 64}
    work = ring_work(spec, Layout("contiguous", devices), devices * local, **blocks)
    reached = min(devices - 1, math.ceil((window - 1) / local))
    assert work.hops == reached <= math.ceil(window / local)
    # The last device's keys are nobody's but its own, and nothing goes round the corner.
    assert work.sent[-1] == 0
    # Within one hop's reach, only the end of a stretch travels.
    expected = window - 1 if reached <= 1 else reached * local
    assert max(work.sent) == expected or reached >= devices - 1
    # A zigzag device's two stretches lie at both ends: neighbours on both sides send one each.
    zigzag = ring_work(spec, Layout("zigzag", devices), devices * local, **blocks)
    pieces = math.ceil((window - 1) / (local // 2))
    assert zigzag.hops == min(2 * min(pieces, devices - 1), devices - 1) or pieces > devices // 2
    assert sum(zigzag.tiles) == sum(work.tiles)


def test_documents_are_no_work_for_each_other():
    length, devices = 4096, 8
    segments, positions = packed(np.random.default_rng(0), 1, length, 20, padding=100)
    causal = AttentionSpec(ordered=True)
    tokens = {"positions": positions[0], "segments": segments[0]}
    blocks = {"block_q": 64, "block_kv": 64}
    dense = ring_work(causal, Layout("zigzag", devices), length, **blocks)
    few = ring_work(causal, Layout("zigzag", devices), length, **blocks, **tokens)
    assert sum(few.tiles) < 0.3 * sum(dense.tiles)
    assert sum(few.tiles) == devices * few.ideal


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_layouts_hold_every_token_once(kind, devices):
    layout = Layout(kind, devices)
    length = 6 * layout.multiple
    x = np.arange(length)[None]
    arranged = layout.arrange(x)
    parts = arranged.reshape(devices, -1)
    for rank, part in enumerate(parts):
        np.testing.assert_array_equal(part, layout.indices(rank, part.size))
        assert (np.diff(part) > 0).all()
        runs = np.concatenate([np.array(run) for run in layout.runs(rank, part.size)])
        assert set(part) <= set(runs)
    np.testing.assert_array_equal(layout.restore(arranged), x)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])
def test_groups_of_devices_lie_as_one_device(kind):
    layout = Layout(kind, 6)
    length = 4 * layout.multiple
    parts = layout.arrange(np.arange(length)[None]).reshape(6, 1, -1)
    for size in (1, 2, 3, 6):
        grouped = layout.grouped(size)
        for group in range(6 // size):
            members = np.concatenate(parts[group * size : (group + 1) * size], axis=1)
            joined = np.asarray(layout.join(jax.numpy.asarray(members), size))
            expected = grouped.indices(group, length * size // 6)
            np.testing.assert_array_equal(joined[0], expected)
            np.testing.assert_array_equal(layout.part(joined, size), members)


def test_one_device_takes_any_length():
    for kind in ("contiguous", "zigzag", "striped"):
        Layout(kind, 1).check(1001)


def test_lengths_that_cannot_be_split_name_the_nearest():
    with pytest.raises(ValueError, match="1000 tokens: the zigzag layout over 8 devices takes mul"):
        Layout("zigzag", 8).check(1000)
    with pytest.raises(ValueError, match="nearest 992 or 1008"):
        Layout("zigzag", 8).check(1000)
    with pytest.raises(ValueError, match="there are contiguous, zigzag, striped"):
        Layout("round", 8)
