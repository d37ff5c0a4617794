"""How one decode call is cut: tiles, buffers, splits. Plain numbers, known when it is traced."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from memtrain_kernels.attention.hopper.tile import Scoring
from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.decode.capabilities import Problem, Scales
from memtrain_kernels.decode.paging import Pages
from memtrain_kernels.decode.quantize import is_quantized


# Tokens of a tile: the rows of a matrix instruction. Queries are its columns, of which it takes any
# multiple of eight: the other way round, one query would be padded to 64.
TILE = 64
_COLUMNS = (8, 16, 32, 64)
# Of an H100 (SXM) or H200.
_MULTIPROCESSORS = 132
_SHARED_BYTES = 228 * 1024
_RESERVED_BYTES = 1024  # of each thread block
_REGISTERS = 65536
_THREADS = 128
_MAX_BLOCKS = 4
# 4.3 TB/s times a latency of 1 us, over the multiprocessors, is 33 KB that must be under way on
# each. A thread block aims at this much, and two or three of them share a multiprocessor, so that
# one loads while another computes.
_BUFFER_BYTES = 48 * 1024
_STAGES = (2, 4)  # least and most
# A split is at least this many tiles long: its start, the first loads, has a latency of its own.
_SPLIT_TILES = 4
_MAX_SPLITS = 64
# Splits are added until this share of the best use of the last wave of thread blocks is reached.
_GOOD_SHARE = 0.85


@dataclass(frozen=True)
class Plan:
    """One call: B rows of T queries, H heads on K key heads of head_dim D and value_dim E, P pages
    of S slots, M of them in a row's table.

    splits: runs of a row's tiles, worked on side by side. k_scales, v_scales: as in Problem.
    """

    B: int
    T: int
    H: int
    K: int
    D: int
    E: int
    P: int
    S: int
    M: int
    dtype: str
    page_dtype: str
    k_scales: Scales
    v_scales: Scales
    splits: int
    spec: AttentionSpec

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.H // self.K

    @property
    def columns(self) -> int:
        """N: queries that one thread block takes, padded."""
        pages = (self.D, self.E, self.S, self.page_dtype)
        return columns_of(self.T * self.group, *pages, (self.k_scales, self.v_scales))

    @property
    def chunks(self) -> int:
        """Thread blocks into which the queries of a key head are cut."""
        return -(-self.T * self.group // self.columns)

    @property
    def quantized(self) -> bool:
        return is_quantized(self.page_dtype)

    @property
    def scales_queries(self) -> bool:
        """Whether queries meet keys in float16, each divided by a power of two that makes room."""
        return self.page_dtype == "float8_e4m3fn" and self.dtype == "bfloat16"

    @property
    def score_dtype(self) -> str:
        """Of queries and keys where they are multiplied. The chip has an instruction from float8 to
        float16; to bfloat16 it takes four."""
        return "float16" if self.scales_queries else self.dtype

    @property
    def value_dtype(self) -> str:
        """Of exponentials and values where they are multiplied. float16 is more exact and, for
        float8 values, faster; exponentials times a page's scale are out of its range."""
        if self.dtype == "float32" or not self.quantized:
            return self.dtype
        if self.v_scales == "page":
            return "bfloat16"
        return "float16" if self.page_dtype == "float8_e4m3fn" else self.dtype

    @property
    def stages(self) -> int:
        return stages_of(self.D, self.E, self.page_dtype)

    @property
    def wide_dims(self) -> int:
        """Dims of 8-bit keys or values that are in registers at once."""
        return 128 if max(self.D, self.E) <= 128 and self.columns <= 32 else 64

    @property
    def pages_per_tile(self) -> int:
        return max(TILE // self.S, 1)

    @property
    def tiles_per_page(self) -> int:
        return max(self.S // TILE, 1)

    @property
    def tokens_per_copy(self) -> int:
        return min(TILE, self.S)

    @property
    def scoring(self) -> Scoring:
        return Scoring.of(self.spec, self.D)


def make_plan(q_BTHD: jax.Array, pages: Pages, spec: AttentionSpec, splits: int | None) -> Plan:
    """The plan of arrays, or shapes. splits None: as many as fill the device."""
    p = Problem.of(q_BTHD, pages, spec)
    most = -(-p.max_pages * p.page_size // TILE)
    if splits is None:
        splits = fill_device(p, most)
    return Plan(
        *(p.B, p.T, p.H, p.K, p.head_dim, p.value_dim),
        *(pages.k_PSKD.shape[0], p.page_size, p.max_pages),
        *(p.dtype, p.page_dtype, *p.scales, min(splits, most), spec),
    )


def fill_device(p: Problem, tiles: int) -> int:
    """Splits of rows of at most `tiles` tiles, so that no wave of thread blocks is ill filled."""
    pages = (p.head_dim, p.value_dim, p.page_size, p.page_dtype, p.scales)
    columns = columns_of(p.T * p.H // p.K, *pages)
    blocks = p.B * p.K * -(-p.T * p.H // (p.K * columns))
    slots = _MULTIPROCESSORS * blocks_per_multiprocessor(columns, *pages)
    most = min(max(tiles // _SPLIT_TILES, 1), _MAX_SPLITS)
    shares = [blocks * n / (slots * math.ceil(blocks * n / slots)) for n in range(1, most + 1)]
    return next(n for n, x in enumerate(shares, 1) if x >= _GOOD_SHARE * max(shares))


def columns_of(
    queries: int, D: int, E: int, page_size: int, page_dtype: str, scales: tuple[Scales, Scales]
) -> int:
    """Columns of a thread block for the queries of a key head; what is left goes to another one,
    which reads the same pages, from the cache. Wide values, 8-bit numbers on their way, and the
    numbers and scales of a tile's pages, if there are several, must be in registers beside them."""
    most = 64 if max(D, E) <= 128 else 32
    if is_quantized(page_dtype) and queries > most:
        most = 32
    by_page = "page" in scales and page_size < TILE
    most //= (2 if page_size <= 8 else 1) * (2 if by_page else 1)
    return next((n for n in _COLUMNS if queries <= n <= most), most)


def stages_of(D: int, E: int, page_dtype: str) -> int:
    """Tiles of keys and values that are under way at once."""
    tile_bytes = TILE * (D + E) * jnp.dtype(page_dtype).itemsize
    return min(max(_BUFFER_BYTES // tile_bytes, _STAGES[0]), _STAGES[1])


def blocks_per_multiprocessor(
    columns: int, D: int, E: int, page_size: int, page_dtype: str, scales: tuple[Scales, Scales]
) -> int:
    """Thread blocks that run on a multiprocessor at the same time: an estimate from below, which
    the ahead-of-time compilation checks."""
    size = jnp.dtype(page_dtype).itemsize
    keys, values = (stages_of(D, E, page_dtype) * TILE * dim * size for dim in (D, E))
    widened = TILE * E * 2 if size == 1 else 0
    # The output takes the place of keys; 4 KiB are for barriers and what warps exchange.
    shared = max(keys, 4 * columns * E) + values + widened + 2 * columns * (D + TILE) + 4096
    by_memory = _SHARED_BYTES // (shared + _RESERVED_BYTES)
    # Registers of a thread, from above: sums, 8-bit numbers on their way, what is read ahead.
    registers = 72 + columns * (E + 3 * TILE) // _THREADS
    registers += 3 * min(D, 128) // 8 if size == 1 else 0
    registers += (TILE // page_size) * (12 if "page" in scales else 4) if page_size < TILE else 0
    by_registers = _REGISTERS // (_THREADS * min(registers, 255))
    return max(min(by_memory, by_registers, _MAX_BLOCKS), 1)
