"""A read of a bank beside the plain way: all scores, then top-k. Time, and the compiler's memory.

The bank is a ring that has turned, with positions and documents, of 65,536 slots and a window's.
The read is the whole of it: the search under its mask, the softmax, the sum of the values. The
plain way is `q @ K.T` and `lax.top_k` and nothing else: no mask, no values.

Then calls from an empty memory, as in training on rows: the call's tokens look up each other. The
mask tells which tiles of keys no query reaches (`Visible.reaches`), beside the same mask that does
not tell.
"""

from __future__ import annotations

import functools
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import interleaved, median_ratio, write

from memtrain.memory.bank import Visible
from memtrain.train.records import versions
from memtrain_kernels import KeyedValues, topk_attention


@dataclass(frozen=True)
class Options:
    slots: int = 65_536
    window: int = 512
    queries: tuple[int, ...] = (1, 64, 512)
    """Tokens of a call."""
    rows: tuple[int, ...] = (4096, 16_384)
    """Tokens of a call from an empty memory."""
    row_bank: int = 4096
    """Positions that such a call's tokens may look up, beyond the window."""
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    top_k: int = 32
    rounds: int = 15
    out: Path | None = None


def main() -> None:
    options = tyro.cli(Options)
    results = {}
    for queries in options.queries:
        found = compare(options, queries)
        results[f"{queries} queries"] = found
        print(
            f"{queries:>4} queries: {found['seconds'] * 1e3:.1f} ms and "
            f"{found['temporary_bytes'] / 2**20:.0f} MiB, plain {found['plain_seconds'] * 1e3:.1f} "
            f"ms and {found['plain_temporary_bytes'] / 2**20:.0f} MiB: "
            f"{1 / found['plain_over_ours']:.2f} x the time"
        )
    rows = {}
    for tokens in options.rows:
        found = from_empty(options, tokens)
        rows[f"{tokens} tokens"] = found
        print(
            f"{tokens:>6} tokens from an empty memory: {found['seconds'] * 1e3:.0f} ms, without "
            f"skipping {found['all_tiles_seconds'] * 1e3:.0f} ms: "
            f"{1 / found['all_tiles_over_ours']:.2f} x the time"
        )
    about = {"device": jax.devices()[0].device_kind, **vars(options), "out": None}
    write(options.out, "bank", {**about, "cases": results, "from_empty": rows}, versions())


def compare(options: Options, T: int) -> dict[str, float]:
    """One call of T tokens, at positions after a bank that is full."""
    H, K, D, k = options.heads, options.kv_heads, options.head_dim, options.top_k
    S = options.slots + options.window
    rng = np.random.default_rng(0)
    q, keys, values = (
        jnp.asarray(rng.standard_normal((1, n, heads, D)), jnp.float32)
        for n, heads in ((T, H), (S, K), (S, K))
    )
    positions = jnp.asarray(np.roll(np.arange(S, dtype=np.int32), S // 3)[None])
    bank = KeyedValues(keys, values, positions, jnp.zeros((1, S), jnp.int32))
    at = jnp.arange(S, S + T, dtype=jnp.int32)[None]
    read = functools.partial(
        topk_attention,
        top_k=k,
        q_positions=at,
        q_segments=jnp.zeros((1, T), jnp.int32),
        mask_fn=Visible(options.window, S),
    )

    def plain(q, keys):
        scores = jnp.einsum(
            "btkgd,bskd->bkgts", q.reshape(1, T, K, H // K, D), keys, precision="highest"
        )
        return jax.lax.top_k(scores, k)

    ours = jax.jit(lambda q, bank: read(q, [bank])).lower(q, bank).compile()
    theirs = jax.jit(plain).lower(q, keys).compile()
    check(options, q, bank, at, ours(q, bank))
    seconds = interleaved(
        {
            "ours": lambda: jax.block_until_ready(ours(q, bank)),
            "plain": lambda: jax.block_until_ready(theirs(q, keys)),
        },
        rounds=options.rounds,
    )
    temporaries = [_temporaries(program) for program in (ours, theirs)]
    return {
        "seconds": statistics.median(seconds["ours"]),
        "plain_seconds": statistics.median(seconds["plain"]),
        "plain_over_ours": median_ratio(seconds, "ours", "plain"),
        "temporary_bytes": temporaries[0],
        "plain_temporary_bytes": temporaries[1],
    }


def from_empty(options: Options, T: int) -> dict[str, float]:
    """One call of T tokens whose bank is what the call itself has read."""
    H, K, D = options.heads, options.kv_heads, options.head_dim
    rng = np.random.default_rng(0)
    q, keys, values = (
        jnp.asarray(rng.standard_normal((1, T, heads, D)), jnp.float32) for heads in (H, K, K)
    )
    at = jnp.arange(T, dtype=jnp.int32)[None]
    one = jnp.zeros((1, T), jnp.int32)
    visible = Visible(options.window, options.window + options.row_bank)

    def read(mask: Any) -> Any:
        def call(q, keys, values):
            parts = [KeyedValues(keys, values, at, one)]
            return topk_attention(
                q, parts, options.top_k, q_positions=at, q_segments=one, mask_fn=mask
            )

        return jax.jit(call)

    ours, theirs = read(visible), read(lambda *at: visible(*at))
    for a, b in zip(ours(q, keys, values), theirs(q, keys, values), strict=True):
        np.testing.assert_array_equal(a, b)
    seconds = interleaved(
        {
            "ours": lambda: jax.block_until_ready(ours(q, keys, values)),
            "all tiles": lambda: jax.block_until_ready(theirs(q, keys, values)),
        },
        rounds=options.rounds,
        warmup=1,
    )
    return {
        "seconds": statistics.median(seconds["ours"]),
        "all_tiles_seconds": statistics.median(seconds["all tiles"]),
        "all_tiles_over_ours": median_ratio(seconds, "ours", "all tiles"),
    }


def _temporaries(program: Any) -> int:
    return program.memory_analysis().temp_size_in_bytes


def check(options: Options, q, bank: KeyedValues, at, found) -> None:
    """The last query's read of its first head, in float64."""
    S, visible = bank.positions.shape[1], Visible(options.window, bank.positions.shape[1])
    position, query_at = np.asarray(bank.positions[0]), int(at[0, -1])
    scores = np.asarray(bank.keys[0, :, 0], np.float64) @ np.asarray(q[0, -1, 0], np.float64)
    distance = query_at - position
    seen = (distance >= visible.first) & (distance < visible.last)
    best = np.argsort(-np.where(seen, scores, -np.inf), kind="stable")[: options.top_k]
    assert len(best) == options.top_k <= S
    weights = np.exp(scores[best] - scores[best].max())
    want = weights / weights.sum() @ np.asarray(bank.values[0, best, 0], np.float64)
    assert set(np.asarray(found.positions[0, -1, 0])) == set(position[best])
    np.testing.assert_allclose(found.out[0, -1, 0], want, atol=1e-5)


if __name__ == "__main__":
    main()
