"""Which tiles are visited: exactly those with a visible pair, or more, each of them once."""

import functools
import itertools

import hopper_oracle as oracle
import jax
import jax.numpy as jnp
import layouts
import numpy as np
import pytest

from memtrain_kernels import AttentionSpec
from memtrain_kernels.attention.hopper import plan as plans
from memtrain_kernels.attention.hopper.schedule import full, live, visit


SPECS = {
    "causal": AttentionSpec(),
    "all": AttentionSpec(causal=False),
    "window": AttentionSpec(window=100),
    "right": AttentionSpec(causal=False, window=(30, 90)),
    "sinks": AttentionSpec(window=20, sink_tokens=4),
    "prefix": AttentionSpec(window=20, prefix=150),
}
BLOCKS = plans.Blocks(128, 64, 2, 2)


@pytest.mark.parametrize(
    ("name", "layout"),
    list(itertools.product(SPECS, ["default", "packed", "shuffled", "zigzag"])),
)
def test_walks_against_the_dense_mask(name: str, layout: str) -> None:
    spec, B, T = SPECS[name], 2, 700
    arrays, given = layouts.tokens(layout, B, T, T, seed=1)
    tokens = plans.make_tokens(T, T, *(None if x is None else jnp.asarray(x) for x in given))
    batch = tokens.q_pos.shape[0]
    length = plans.padded_length(T)
    plan = plans.Plan(B, length, length, 1, 1, 64, batch, spec)
    seen = np.zeros((batch, length, length), bool)
    seen[:, :T, :T] = oracle.mask(spec, *arrays)[:batch]
    tiles = seen.reshape(batch, length // 128, 128, length // 64, 64)
    some, every = tiles.any((2, 4)), tiles.all((2, 4))
    over_keys = plans.tables_of_queries(plan, BLOCKS, tokens)
    over_queries = plans.tables_of_keys(plan, BLOCKS, tokens)
    q = plans.read_summary(over_keys.own, slice(None), slice(None))
    kv = plans.read_summary(over_keys.other, slice(None), slice(None))
    q, kv = (type(q)(*(x[:, :, None] for x in q)), type(kv)(*(x[:, None] for x in kv)))
    alive, whole = np.asarray(live(spec, q, kv)), np.asarray(full(spec, q, kv))
    assert (alive >= some).all() and (whole <= every).all()
    if layout == "default":
        # Nothing is visited in vain, and nothing is masked that need not be.
        np.testing.assert_array_equal(alive, some)
        np.testing.assert_array_equal(whole, every)
    for tables, rows in ((over_keys, alive), (over_queries, alive.swapaxes(1, 2))):
        visits, count = _visits(spec, tables.walks, rows)
        np.testing.assert_array_equal(visits, rows.astype(int))
        np.testing.assert_array_equal(count, rows.sum(-1))


@functools.partial(jax.jit, static_argnums=0)
def _visits(spec: AttentionSpec, walks: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Walk as the kernels do, block by block: how often each tile is taken, and the count."""

    def one(walks: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        walk = plans.read_walk(walks[None, None], 0, 0)
        nothing = jnp.zeros(len(row), jnp.int32)
        taken = visit(spec, walk, lambda j: row[j], lambda j, v: v.at[j].add(1), nothing)
        return taken, walk.count

    return jax.vmap(jax.vmap(one))(walks, rows)


def test_what_lies_between_sinks_and_window_is_not_looked_at() -> None:
    T = 64 * 128
    spec = AttentionSpec(window=256, sink_tokens=4)
    tokens = plans.make_tokens(T, T, None, None, None, None)
    plan = plans.Plan(1, T, T, 1, 1, 64, 1, spec)
    walk = plans.read_walk(plans.tables_of_queries(plan, BLOCKS, tokens).walks, 0, slice(10, None))
    looked_at = (walk.early_end - walk.early) + (walk.near_end - walk.near)
    np.testing.assert_array_equal(looked_at, walk.count)
    assert int(walk.count.max()) == 1 + (256 + 128) // 64
