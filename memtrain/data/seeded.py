"""Randomness as a pure function of a key: the same on every host, process and NumPy version.

NumPy promises stable streams for bit generators but not for what its `Generator` draws from them,
and a resumed run must read what the first one would have. So everything random in this room comes
from SplitMix64 (Steele, Lea and Flood 2014), evaluated at a counter.
"""

import hashlib

import numpy as np


_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def derive(*parts: int | str) -> int:
    """A 64-bit key from a path of numbers and names; different paths are independent."""
    text = repr(tuple(part if isinstance(part, str) else int(part) for part in parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def random_bits(key: int, count: int) -> np.ndarray:
    """[count] uint64: outputs 1..count of SplitMix64 seeded with `key`."""
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key & _MASK)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
    return z ^ (z >> np.uint64(31))


def random_uniform(key: int, count: int) -> np.ndarray:
    """[count] float64 in the open interval (0, 1)."""
    return ((random_bits(key, count) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def random_integers(key: int, count: int, high: int) -> np.ndarray:
    """[count] int64 in [0, high), high <= 2**32 (bias below high / 2**32)."""
    assert 0 < high <= 1 << 32
    bits = random_bits(key, count) >> np.uint64(32)
    return ((bits * np.uint64(high)) >> np.uint64(32)).astype(np.int64)


def random_order(key: int, count: int) -> np.ndarray:
    """[count] int64: a random permutation of 0..count-1, held in memory."""
    return np.argsort(random_bits(key, count), kind="stable")


def distinct_integers(key: int, count: int, high: int) -> np.ndarray:
    """[count] int64 drawn from [0, high) without replacement, in the order drawn."""
    assert 0 <= count <= high
    if 4 * count >= high:
        return random_order(key, high)[:count]
    # Drawing with replacement and leaving out what was drawn before is drawing without it.
    draws = 2 * count + 8
    while True:
        values = random_integers(key, draws, high)
        first = np.sort(np.unique(values, return_index=True)[1])
        if len(first) >= count:
            return values[first[:count]]
        draws *= 2


class Permutation:
    """A random permutation of 0..size-1 in O(1) memory, evaluated at one index at a time.

    A Feistel network over the smallest even number of bits that holds `size`, applied again until
    the result is in range (cycle walking: Black and Rogaway 2002), so it is a bijection.
    """

    ROUNDS = 6

    def __init__(self, size: int, key: int) -> None:
        assert size > 0
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._keys = [int(bits) for bits in random_bits(key, self.ROUNDS)]

    def __call__(self, index: int) -> int:
        """Where `index` (0 <= index < size) goes."""
        assert 0 <= index < self.size
        half, mask = self._half_bits, (1 << self._half_bits) - 1
        while True:
            left, right = index >> half, index & mask
            for key in self._keys:
                z = ((right + key) * _GOLDEN) & _MASK
                z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
                left, right = right, left ^ ((z >> 32) & mask)
            index = (left << half) | right
            if index < self.size:
                return index

    def of(self, indices: np.ndarray) -> np.ndarray:
        """[n] int64: where each of the indices goes, at once."""
        half, mask = np.uint64(self._half_bits), np.uint64((1 << self._half_bits) - 1)
        assert not len(indices) or (indices.min() >= 0 and indices.max() < self.size)
        found = np.asarray(indices).astype(np.uint64)
        walking = np.ones(len(found), np.bool_)
        while walking.any():
            left, right = found[walking] >> half, found[walking] & mask
            for key in self._keys:
                z = (right + np.uint64(key)) * np.uint64(_GOLDEN)
                z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
                left, right = right, left ^ ((z >> np.uint64(32)) & mask)
            found[walking] = (left << half) | right
            walking = found >= self.size
        return found.astype(np.int64)
