"""Which tiles are visited, and that what the kernels hold in scalar memory is bounded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
import tile_oracle

from memtrain_kernels.attention import AttentionSpec
from memtrain_kernels.attention.tpu import operation, tables
from memtrain_kernels.attention.tpu.block_sizes import Blocks


BLOCK = 8


def sides(q_pos, kv_pos, q_seg, kv_seg):
    B = q_pos.shape[0]
    arrays = (jnp.asarray(x, jnp.int32) for x in (q_pos, kv_pos, q_seg, kv_seg))
    q_pos, kv_pos, q_seg, kv_seg = arrays
    return (
        tables.make_side(q_pos, q_seg, B, BLOCK),
        tables.make_side(kv_pos, kv_seg, B, BLOCK),
    )


def visited(table: jax.Array, num_rows: int, others: int) -> np.ndarray:
    """bool [rows, rows of the other side]: what the index maps walk through."""
    flat, walked = table.reshape(-1), np.zeros((num_rows, others), bool)
    counts = np.asarray(table)[:, 1]
    steps = np.arange(max(counts.max(), 1))
    rows = jax.vmap(
        lambda row: jax.vmap(lambda step: tables.visit(flat, row, step))(jnp.asarray(steps))
    )(jnp.arange(num_rows))
    assert set(np.unique(rows).tolist()) <= set(range(others))
    for row in range(num_rows):
        own = np.asarray(rows)[row, : counts[row]]
        assert len(set(own)) == len(own), "a tile is visited twice"
        walked[row, own] = True
    return walked


def blocks_with_a_pair(spec, q_pos, kv_pos, q_seg, kv_seg) -> np.ndarray:
    """bool [B * n, B * m]: tiles in which some query sees some key, by the oracle."""
    B, T = q_pos.shape
    n, m = -(-T // BLOCK), -(-kv_pos.shape[1] // BLOCK)
    needed = np.zeros((B * n, B * m), bool)
    for b in range(B):
        seen = tile_oracle.mask(spec, q_pos[b], kv_pos[b], q_seg[b], kv_seg[b])
        padded = np.zeros((n * BLOCK, m * BLOCK), bool)
        padded[: seen.shape[0], : seen.shape[1]] = seen
        tiles = padded.reshape(n, BLOCK, m, BLOCK).any((1, 3))
        needed[b * n : (b + 1) * n, b * m : (b + 1) * m] = tiles
    return needed


SPECS = {
    "causal": AttentionSpec(),
    "window": AttentionSpec(window=10),
    "window and sinks": AttentionSpec(window=10, sink_tokens=3),
    "two-sided": AttentionSpec(causal=False, window=(6, 20)),
    "prefix": AttentionSpec(window=9, prefix=12),
    "all": AttentionSpec(causal=False),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("kind", ["default", "packed", "shuffled"])
def test_every_tile_with_a_visible_pair_is_visited_once(spec, kind):
    rng = np.random.default_rng(0)
    T = 75
    positions = np.stack([np.arange(T)] * 2).astype(np.int32)
    segments = np.zeros_like(positions)
    if kind == "packed":
        segments, positions = tile_oracle.packed(rng, 2, T, documents=3, padding=13)
    elif kind == "shuffled":
        positions = np.stack([rng.permutation(T) for _ in range(2)]).astype(np.int32)
    arrays = (positions, positions, segments, segments)
    q, kv = sides(*arrays)
    needed = blocks_with_a_pair(spec, *arrays)
    rows = needed.shape[0]
    by_queries = visited(tables.ranges(spec, q.blocks, kv.blocks, of_queries=True), rows, rows)
    by_keys = visited(tables.ranges(spec, q.blocks, kv.blocks, of_queries=False), rows, rows)
    assert not np.any(needed & ~by_queries)
    assert not np.any(needed & ~by_keys.T)
    # In order, the ranges are tight: what is walked is what is needed.
    if kind == "default":
        np.testing.assert_array_equal(by_queries, needed)
        np.testing.assert_array_equal(by_keys.T, needed)


def test_sinks_are_visited_without_walking_to_them():
    """The visits of a query do not grow with the sequence where its window does not."""
    spec = AttentionSpec(window=2 * BLOCK, sink_tokens=3)
    for blocks in (20, 200):
        index = np.arange(blocks * BLOCK)[None]
        q, kv = sides(index, index, 0 * index, 0 * index)
        table = tables.ranges(spec, q.blocks, kv.blocks, of_queries=True)
        assert int(table[:, 1].max()) == 4


def test_one_call_gets_a_bounded_table():
    """Whatever the number of rows: 16 KiB of numbers a call, all rows served, in order."""
    rows = 5 * tables.MAX_ROWS + 3
    table = jnp.tile(jnp.arange(rows, dtype=jnp.int32)[:, None], (1, tables.WORDS))
    seen = []

    def call(flat, steps, x):
        seen.append(flat.size * 4)
        return x * 2, flat.reshape(-1, tables.WORDS)[:, 0]

    doubled, own = jax.jit(lambda t, x: tables.in_chunks(call, t, (x,)))(table, jnp.arange(rows))
    np.testing.assert_array_equal(doubled, 2 * np.arange(rows))
    np.testing.assert_array_equal(own, np.arange(rows))
    assert seen
    assert max(seen) <= 16 * 1024


def test_chunks_and_parts_change_nothing(monkeypatch):
    """Many calls with small tables, and sinks' key blocks apart: the same bits as in one call."""
    spec = AttentionSpec(window=100, sink_tokens=3, block_q=128, block_kv=128)
    inputs, cotangents = problems.arrays(B=2, H=1)
    given = np.arange(300, dtype=np.int32)[None]
    nothing = (None,) * 4
    parts = problems.results(inputs, cotangents, nothing, spec, interpret=True)
    plan = operation.Plan(spec, Blocks(128, 128), Blocks(128, 128), True, True)
    assert operation._head_blocks(plan, 300, 128) == 1
    one = problems.results(inputs, cotangents, (given, given, None, None), spec, interpret=True)
    monkeypatch.setattr(tables, "MAX_ROWS", 2)
    # The same numbers by another description: no program that was made with large tables serves it.
    assert inputs[0].shape[-1] == 64
    again = dataclasses.replace(spec, scale=0.125)
    calls, in_chunks = [], tables.in_chunks
    monkeypatch.setattr(
        tables, "in_chunks", lambda call, t, rows: calls.append(t) or in_chunks(call, t, rows)
    )
    many = problems.results(inputs, cotangents, nothing, again, interpret=True)
    assert len(calls) >= 3 and max(len(t) for t in calls) > 2
    for a, b, c in zip(*(jax.tree.leaves(x) for x in (parts, one, many)), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
