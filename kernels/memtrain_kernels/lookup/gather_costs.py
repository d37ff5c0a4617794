"""What reading a table that is sharded over devices sends, and the chunks in which it is read."""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

from memtrain_kernels.lookup.checks import check_count


Route = Literal["columns", "rows_gather", "rows_all_to_all"]

# Temporaries of one chunk, unless an eighth of the device's share of the table is more.
_CHUNK_BYTES = 2**26
_INDEX_BYTES = 4  # slots int32, weights float32, sums float32


class GatherCost(NamedTuple):
    """Bytes that one device sends for one call, forward and backward."""

    forward: int
    backward: int


class Chunks(NamedTuple):
    """count chunks of tokens tokens each. lanes and capacity: of requests, see `requests`."""

    count: int
    tokens: int
    lanes: int
    capacity: int


def gather_costs(
    num_tokens: int,
    num_slots: int,
    value_dim: int,
    reads_per_token: int,
    num_devices: int,
    itemsize: int,
) -> dict[str, GatherCost]:
    """Bytes sent by each device to read a table that is sharded over `num_devices`, by route.

    num_tokens: of one device. num_slots, value_dim: of the whole table, whose numbers take
    `itemsize` bytes.
    Routes of `sharded_weighted_gather`: "columns"; "rows_gather" and "rows_all_to_all", of which
    its "auto" takes the one that sends less, forward and backward together. Reads are taken to be
    spread evenly over the devices, so that all_to_all takes one round; each further one costs as
    much again. For comparison "table": every device gathers the whole table.
    A device sends what it has to n - 1 others: rings of all-gather and reduce-scatter, and
    all-to-all, send (n - 1) / n of the larger side.
    """
    counts = {
        "num_tokens": num_tokens,
        "num_slots": num_slots,
        "value_dim": value_dim,
        "reads_per_token": reads_per_token,
        "num_devices": num_devices,
        "itemsize": itemsize,
    }
    for name, value in counts.items():
        check_count(name, value, 1, None)
    M, V, K, n = num_tokens, value_dim, reads_per_token, num_devices
    shard_bytes = num_slots * V * itemsize // n
    indices = (n - 1) * M * K * 2 * _INDEX_BYTES
    weights_back = (n - 1) * M * K * _INDEX_BYTES
    own_columns = (n - 1) * M * V * itemsize // n
    chunks = plan_chunks("rows_all_to_all", M, shard_bytes, V, K, n)
    requests = (n - 1) * chunks.count * chunks.capacity
    pair = 2 * _INDEX_BYTES * chunks.lanes
    return {
        "columns": GatherCost(indices + own_columns, indices + own_columns + weights_back),
        "rows_gather": GatherCost(
            indices + (n - 1) * M * V * _INDEX_BYTES,
            indices + (n - 1) * M * V * itemsize + weights_back,
        ),
        "rows_all_to_all": GatherCost(
            requests * (pair + V * _INDEX_BYTES),
            requests * (pair + V * itemsize + _INDEX_BYTES * chunks.lanes),
        ),
        "table": GatherCost(
            (n - 1) * num_slots * V * itemsize // n, (n - 1) * num_slots * V * _INDEX_BYTES // n
        ),
    }


def plan_chunks(
    route: Route,
    num_tokens: int,
    shard_bytes: int,
    value_dim: int,
    reads_per_token: int,
    num_devices: int,
    chunk_tokens: int | None = None,
) -> Chunks:
    """Chunks of about equal length whose temporaries are bounded, unless chunk_tokens says how
    long.

    shard_bytes: of the device's share of the table: chunks of a fraction of it cost little beside
    it, and make passes over its gradient few.
    """
    V, K, n = value_dim, reads_per_token, num_devices
    lanes, mean, _ = _request_shape(V, K, n)

    def a_row(width: int, reads: int) -> int:
        # A sum sent and one received; sums of runs in the gradient, a row in 32 reads, and the
        # scan over them; indices.
        return int(4 * width * (2 + 3 * reads / 32)) + 16 * reads

    a_token = {
        "columns": n * a_row(-(-V // n), K),
        "rows_gather": n * a_row(V, K),
        "rows_all_to_all": int(1.25 * n * mean * a_row(V, lanes)) + 40 * K,
    }[route]
    fit = max(1, max(_CHUNK_BYTES, shard_bytes // 8) // a_token)
    count = -(-num_tokens // min(num_tokens, chunk_tokens or fit))
    tokens = -(-num_tokens // count)
    return Chunks(count, tokens, lanes, _capacity(tokens, V, K, n))


def _capacity(tokens: int, value_dim: int, reads: int, num_devices: int) -> int:
    """Requests to one device for which a round has room: the mean, an eighth more, and three
    standard deviations."""
    lanes, mean, variance = _request_shape(value_dim, reads, num_devices)
    room = math.ceil(1.125 * tokens * mean + 3 * math.sqrt(tokens * variance))
    return max(1, min(room, tokens * -(-reads // lanes)))


@functools.cache
def _request_shape(value_dim: int, reads: int, num_devices: int) -> tuple[int, float, float]:
    """(lanes, mean, variance): the lanes that send the fewest bytes, and how many requests a token
    then makes to one device, if its reads are spread evenly."""
    p = 1 / num_devices
    chance = [
        math.comb(reads, j) * p**j * (1 - p) ** (reads - j) for j in range(reads + 1)
    ]  # of j reads with one device

    def moments(lanes: int) -> tuple[float, float]:
        made = [-(-j // lanes) for j in range(reads + 1)]
        mean = sum(c * m for c, m in zip(chance, made, strict=True))
        return mean, sum(c * m * m for c, m in zip(chance, made, strict=True)) - mean**2

    lanes = min(range(1, reads + 1), key=lambda L: moments(L)[0] * (2 * L + value_dim))
    return lanes, *moments(lanes)
