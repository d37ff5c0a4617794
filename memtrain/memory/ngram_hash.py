"""Addresses of n-grams: the table rows that the last n token ids of a token name.

Multiplicative-XOR hashing (Engram, DeepSeek 2026, arXiv 2601.07372), from the paper's equations:
for every order n and head k,

    z[t] = (a_n0 c[t] ^ a_n1 c[t-1] ^ ... ^ a_n,n-1 c[t-n+1]) mod M_nk

c being canonical ids counted from 1, and 0 where the document has no token. Products are exact in
64 bits, in halves of 32: no integer here is wider, so that devices without 64-bit integers give the
same rows. Everything is a function of token ids alone, and NumPy arrays stay NumPy arrays: a host
can know, and fetch, the rows of a batch before any device sees it (`NGramHash.addresses`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import unicodedata
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, UInt32

from memtrain.errors import BadInput


NOTHING = -1
"""The id that stands before a document's first token."""

MAX_INT32 = 2**31 - 1
"""What ids and rows are counted up to."""

_ROW_MULTIPLE = 1024
"""Tables have a multiple of this many rows, so that a mesh can split them."""

Ids = Any
"""An array of NumPy or of JAX; results are of the same."""


@dataclasses.dataclass(frozen=True)
class NGramHash:
    """Token ids to rows of one table, in which all orders' and heads' parts lie one after another.

    num_slots: least rows of a part; each has a prime number of them, all different.
    vocab_size: ids are below it; None for any. canonical: the id that each id stands for.
    """

    orders: tuple[int, ...]
    num_heads: int
    num_slots: int
    seed: int = 0
    vocab_size: int | None = None
    canonical: tuple[int, ...] | None = None

    @property
    def reach(self) -> int:
        """Tokens that are looked at, the current one included."""
        return max(self.orders)

    @property
    def num_parts(self) -> int:
        """Rows that a token reads."""
        return len(self.orders) * self.num_heads

    @property
    def primes(self) -> tuple[int, ...]:
        """Rows of each part: the first primes from `num_slots` on, order by order."""
        return _primes_from(self.num_slots, self.num_parts)

    @property
    def offsets(self) -> tuple[int, ...]:
        """The first row of each part."""
        return tuple(sum(self.primes[:i]) for i in range(self.num_parts))

    @property
    def num_rows(self) -> int:
        """Of the table: all parts, and unused rows up to a number that meshes divide.

        It may be past `MAX_INT32`, which whoever makes the table must refuse.
        """
        return -(-sum(self.primes) // _ROW_MULTIPLE) * _ROW_MULTIPLE

    def multipliers(self, order: int) -> tuple[int, ...]:
        """Odd numbers of 32 bits, the current token's first; drawn from the seed alone."""
        drawn = [
            hashlib.sha256(f"{self.seed}/{order}/{i}".encode()).digest()[:4] for i in range(order)
        ]
        return tuple(int.from_bytes(d, "little") | 0x8000_0001 for d in drawn)

    def addresses(
        self,
        token_ids: Int[Ids, "B T"],
        starts: Bool[Ids, "B T"],
        valid: Bool[Ids, "B T"] | None = None,
        before: Int[Ids, "B L"] | None = None,
    ) -> Int[Ids, "B T K"]:
        """int32 rows that each token reads, order by order and head by head; -1 where invalid.

        The prefetch hook: given NumPy arrays it runs on the host, and gives the very rows that the
        layer reads, with the device's state not asked for.
        starts, valid: as in `Context`, in natural order. before: what `look_back` gave of the call
        before; None is a fresh state.
        Raises BadInput for ids out of range where they are NumPy's; elsewhere such an id counts as
        no token.
        """
        xp = _namespace(token_ids)
        real = xp.ones(token_ids.shape, bool) if valid is None else valid
        ids = self.compress(token_ids, real)
        seen, _ = look_back(ids, starts, real, self.reach, before)
        return xp.where(real[..., None], self.rows(seen), -1)

    def compress(self, token_ids: Int[Ids, "B T"], valid: Bool[Ids, "B T"]) -> Int[Ids, "B T"]:
        """Canonical ids; `NOTHING` for an id out of range, or BadInput where it can be seen."""
        xp = _namespace(token_ids)
        token_ids = token_ids.astype(np.int64 if xp is np else np.int32)
        bound = MAX_INT32 if self.vocab_size is None else self.vocab_size - 1
        inside = (token_ids >= 0) & (token_ids <= bound)
        if isinstance(token_ids, np.ndarray) and isinstance(valid, np.ndarray):
            wrong = token_ids[~inside & valid]
            if wrong.size:
                raise BadInput(
                    f"token id {int(wrong[0])}: the n-gram hash takes ids from 0 to {bound}"
                )
        ids = token_ids
        if self.canonical is not None:
            ids = xp.asarray(_canonical_array(self.canonical))[xp.clip(token_ids, 0, bound)]
        return xp.where(inside, ids, NOTHING).astype(np.int32)

    def rows(self, seen: Int[Ids, "B T N"]) -> Int[Ids, "B T K"]:
        """Rows named by ids [..., i], those of i tokens ago."""
        xp = _namespace(seen)
        words = seen.astype(np.uint32) + np.uint32(1)
        found = []
        for i, order in enumerate(self.orders):
            high = low = xp.zeros(seen.shape[:-1], np.uint32)
            for ago, multiplier in enumerate(self.multipliers(order)):
                more_high, more_low = product(words[..., ago], multiplier)
                high, low = high ^ more_high, low ^ more_low
            own = slice(i * self.num_heads, (i + 1) * self.num_heads)
            part = remainder(high, low, np.array(self.primes[own], np.uint32))
            found.append(part.astype(np.int32) + np.array(self.offsets[own], np.int32))
        return xp.concatenate(found, axis=-1)


def look_back(
    ids: Int[Ids, "B T"],
    starts: Bool[Ids, "B T"],
    valid: Bool[Ids, "B T"],
    size: int,
    before: Int[Ids, "B L"] | None = None,
) -> tuple[Int[Ids, "B T N"], Int[Ids, "B L"]]:
    """The ids of the last `size` tokens of each token's document, its own first; and what the next
    call is given as `before`: the last `size - 1` ids of the document that goes on.

    `NOTHING` stands where the document has no token. In natural order; `valid` is one run a row.
    """
    xp = _namespace(ids)
    B, T = ids.shape
    tail = size - 1
    carried = xp.full((B, tail), NOTHING, np.int32) if before is None else before
    ids = xp.where(valid, ids, NOTHING).astype(np.int32)
    begin = xp.argmax(valid, axis=1)[:, None].astype(np.int32)
    count = xp.sum(valid, axis=1, dtype=np.int32)[:, None]
    begun = xp.cumsum(starts & valid, axis=1, dtype=np.int32)
    rank = xp.arange(T, dtype=np.int32) - begin
    seen = [ids]
    for ago in range(1, size):
        ago_of = lambda a, ago=ago: xp.pad(a, ((0, 0), (ago, 0)))[:, :T]  # noqa: E731
        found = xp.where((rank >= ago) & (ago_of(begun) == begun), ago_of(ids), NOTHING)
        # What came before the call stands right before the first valid token, wherever that is.
        for slot in range(tail - ago, tail):
            there = (rank == slot - tail + ago) & (begun == 0)
            found = xp.where(there, carried[:, slot : slot + 1], found)
        seen.append(xp.where(valid, found, NOTHING))
    line = xp.concatenate([carried, ids], axis=1)
    owner = xp.concatenate([xp.zeros((B, tail), np.int32), begun], axis=1)
    last = count - tail + xp.arange(tail, dtype=np.int32)
    index = tail + xp.where(last >= 0, begin + last, last)
    mine = xp.take_along_axis(owner, index, axis=1) == begun[:, -1:]
    after = xp.where(mine, xp.take_along_axis(line, index, axis=1), NOTHING)
    return xp.stack(seen, axis=-1), after.astype(np.int32)


def product(word: UInt32[Ids, "*s"], by: int) -> tuple[UInt32[Ids, "*s"], UInt32[Ids, "*s"]]:
    """word * by, both below 2**32, as its upper and its lower 32 bits."""
    half, mask = np.uint32(16), np.uint32(0xFFFF)
    by_low, by_high = np.uint32(by & 0xFFFF), np.uint32(by >> 16)
    low, high = word & mask, word >> half
    cross, crossed = low * by_high, high * by_low
    base = low * by_low
    middle = (base >> half) + (cross & mask) + (crossed & mask)
    upper = high * by_high + (cross >> half) + (crossed >> half) + (middle >> half)
    return upper, (base & mask) | (middle << half)


def remainder(
    high: UInt32[Ids, "*s"], low: UInt32[Ids, "*s"], primes: UInt32[np.ndarray, "K"]
) -> UInt32[Ids, "*s K"]:
    """(2**32 high + low) mod each of the primes, which are below 2**31.

    Horner's rule in digits that are narrow enough for a remainder and a digit to fit in 32 bits.
    """
    rest, left = high[..., None] % primes, 32
    digit_bits = 32 - int(primes.max()).bit_length()
    while left:
        bits = min(digit_bits, left)
        left -= bits
        digit = (low >> np.uint32(left)) & np.uint32(2**bits - 1)
        rest = ((rest << np.uint32(bits)) | digit[..., None]) % primes
    return rest


def canonical_ids(pieces: Sequence[bytes]) -> tuple[int, ...]:
    """For each token of a vocabulary, the id of those that read alike; for `compression`.

    pieces: the bytes that each id stands for, `[tokenizer.decode_bytes([i]) for i in ...]`. Alike
    are tokens that differ in case, accents, compatibility forms and surrounding white space; bytes
    that are no UTF-8 are alike to none. Ids are given in order of first appearance.
    """
    known: dict[str | bytes, int] = {}
    return tuple(known.setdefault(_reading(piece), len(known)) for piece in pieces)


def _reading(piece: bytes) -> str | bytes:
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError:
        return piece
    parts = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    plain = "".join(c for c in parts if not unicodedata.combining(c))
    return plain.strip() or (" " if text.isspace() else text)


@functools.lru_cache(maxsize=64)
def _primes_from(least: int, count: int) -> tuple[int, ...]:
    found: list[int] = []
    number = max(least, 2)
    while len(found) < count:
        if _is_prime(number):
            found.append(number)
        number += 1
    return tuple(found)


def _is_prime(n: int) -> bool:
    """Miller and Rabin's test, which with these bases is exact below 3.2e9 (Jaeschke 1993)."""
    bases = (2, 3, 5, 7)
    if n < 2 or any(n % b == 0 for b in bases):
        return n in bases
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    return all(
        pow(b, odd, n) == 1 or any(pow(b, odd << s, n) == n - 1 for s in range(twos)) for b in bases
    )


@functools.lru_cache(maxsize=8)
def _canonical_array(canonical: tuple[int, ...]) -> np.ndarray:
    return np.array(canonical, np.int32)


def _namespace(a: Any) -> Any:
    """NumPy for its arrays, jax.numpy for all others."""
    return np if isinstance(a, np.ndarray) else jnp
