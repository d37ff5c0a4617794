"""Which tiles and pages a split reads, against the mask written out pair by pair."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import paged_oracle as oracle
import pytest

from memtrain_kernels.attention import AttentionSpec
from memtrain_kernels.decode.hopper import plan as plans
from memtrain_kernels.decode.hopper import schedule
from memtrain_kernels.decode.hopper.plan import TILE, Plan
from memtrain_kernels.decode.paging import Pages


LENGTHS = np.array([700, 0, 64, 129, 1, 640], np.int32)
SPECS = {
    "causal": AttentionSpec(),
    "window": AttentionSpec(window=130),
    "sinks": AttentionSpec(window=70, sink_tokens=3),
    "prefix": AttentionSpec(window=70, prefix=200),
    "two sides": AttentionSpec(causal=False, window=(200, 2)),
}


def make_plan(**fields: Any) -> Plan:
    dims: dict[str, Any] = {"H": 2, "K": 1, "D": 64, "E": 64, "P": 99}
    dtypes: dict[str, Any] = {"dtype": "bfloat16", "page_dtype": "bfloat16"}
    return Plan(**dims, **dtypes, k_scales="none", v_scales="none", **fields)


@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("name", SPECS)
def test_every_visible_token_is_read_once_and_other_pages_never(name: str, page_size: int) -> None:
    spec, T, splits, S = SPECS[name], 3, 4, page_size
    M = -(-768 // S)
    plan = make_plan(B=len(LENGTHS), T=T, S=S, M=M, splits=splits, spec=spec)
    nothing = jnp.zeros(())  # the schedule looks at lengths alone
    pages = Pages(nothing, nothing, nothing, jnp.asarray(LENGTHS), None, None)
    runs = np.asarray(schedule.make_runs(plan, pages))
    for b, length in enumerate(LENGTHS):
        queries = [q for q in range(length - T, length) if q >= 0]
        seen = {p: [oracle.sees(spec, q, p) for q in queries] for p in range(length)}
        wanted = {p for p in seen if any(seen[p])}
        read, places = [], set()
        for z in range(splits):
            run = schedule.read_run(runs, b, z)
            for tile in range(run.first, run.first + run.count):
                positions = np.asarray(schedule.key_positions(run, tile, np.arange(TILE)))
                held = [int(p) for p in positions if p < length]
                assert bool(schedule.is_ragged(run, tile)) == (len(held) < TILE)
                if schedule.is_full(plan, run, tile):
                    assert len(held) == TILE and length >= T
                    assert all(all(seen[p]) for p in held)
                # What the copies bring stands where the positions say.
                for c in range(plan.pages_per_tile):
                    place = int(schedule.page_place(plan, run, jnp.int32(tile), c))
                    start = int(schedule.page_slot(plan, jnp.int32(tile)))
                    first = positions[c * plan.tokens_per_copy]
                    assert first >= length or first == place * S + start
                    places.add(place)
                read += held
        assert len(read) == len(set(read)) and wanted <= set(read)
        # A page is read only if one of its tokens lies in the span that some query's rule opens:
        # the window of the first query on, the sinks, the prefix.
        assert places == {p // S for p in read}
        if spec.window_left is not None and wanted:
            first = max(length - T - spec.window_left + 1, 0) // S
            early = -(-max(spec.sink_tokens, spec.prefix) // S)
            assert all(place >= first or place < early for place in places)


def test_most_tiles_are_full() -> None:
    """Masks are for the edges: without a window, for each row's last tile alone."""
    plan = make_plan(B=1, T=1, S=64, M=11, splits=1, spec=AttentionSpec())
    run = schedule.Run(0, 11, 0, 0, jnp.int32(700), 10)
    full = [bool(schedule.is_full(plan, run, tile)) for tile in range(11)]
    assert full == [True] * 10 + [False]


@pytest.mark.parametrize(
    ("rows", "kv_heads", "max_pages"), [(1, 8, 2048), (64, 8, 512), (37, 8, 512), (256, 1, 16)]
)
def test_splits_fill_the_device(rows: int, kv_heads: int, max_pages: int) -> None:
    problem = plans.Problem(
        rows, 1, 32, kv_heads, 128, 128, 64, max_pages, "bfloat16", "bfloat16",
        ("none", "none"), AttentionSpec(),
    )  # fmt: skip
    splits = plans.fill_device(problem, max_pages)
    pages: Any = (128, 128, 64, "bfloat16", ("none", "none"))
    columns = plans.columns_of(32 // kv_heads, *pages)
    slots = 132 * plans.blocks_per_multiprocessor(columns, *pages)
    blocks = rows * kv_heads * splits
    share = blocks / (slots * -(-blocks // slots))
    assert 1 <= splits <= max(max_pages // 4, 1)
    assert share >= 0.75 or splits == max(max_pages // 4, 1)
