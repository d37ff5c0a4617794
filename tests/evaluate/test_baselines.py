"""Markov models against a slow dictionary of counts, xz against the standard library's own."""

import lzma
import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from memtrain.evaluate.baselines import MarkovModels, xz_bits_per_byte


def oracle(train: list[bytes], history: bytes, byte: int, order: int) -> float:
    """Witten-Bell, straight from the recursion, counting followers of contexts in a dictionary."""
    if order < 0:
        return 1 / 256
    lower = oracle(train, history, byte, order - 1)
    if len(history) < order:
        return lower
    followers = _followers(tuple(train), order)[history[len(history) - order :]]
    distinct, total = len(followers), sum(followers.values())
    if not total:
        return lower
    return (followers[byte] + distinct * lower) / (total + distinct)


_cache: dict = {}


def _followers(train: tuple[bytes, ...], order: int):
    if (train, order) not in _cache:
        found: dict[bytes, Counter] = defaultdict(Counter)
        for piece in train:
            for i in range(order, len(piece)):
                found[piece[i - order : i]][piece[i]] += 1
        _cache[train, order] = found
    return _cache[train, order]


TRAIN = [b"the cat sat on the mat, the rat ate the hat", b"", b"ab", b"\x00\x00\xff\x00the end"]
PIECES = [(b"", b"the bat"), (b"th", b"e \x00\x00"), (b"a longer history: the ", b"cat\xfe")]


def array(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8)


def as_arrays(pieces: list[tuple[bytes, bytes]]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(array(history), array(targets)) for history, targets in pieces]


def test_probabilities_are_the_recursion():
    models = MarkovModels(np.frombuffer(piece, np.uint8) for piece in TRAIN)
    found = models.probabilities(as_arrays(PIECES))
    for order in range(4):
        wanted = [
            oracle(TRAIN, history + targets[:i], targets[i], order)
            for history, targets in PIECES
            for i in range(len(targets))
        ]
        np.testing.assert_allclose(found[order], wanted, rtol=1e-12)
    bits = models.bits_per_byte(as_arrays(PIECES))
    assert bits[3] == pytest.approx(-np.mean([math.log2(p) for p in found[3]]))
    assert bits[3] < bits[0] < 8


@pytest.mark.parametrize("history", [b"", b"t", b"the", b" th", b"zzz", b"\x00\x00\xff"])
def test_probabilities_sum_to_one(history):
    models = MarkovModels(np.frombuffer(piece, np.uint8) for piece in TRAIN)
    pieces = as_arrays([(history, bytes([byte])) for byte in range(256)])
    np.testing.assert_allclose(models.probabilities(pieces).sum(axis=1), 1.0, rtol=1e-12)


def test_no_training_text_leaves_the_uniform():
    models = MarkovModels([])
    assert models.num_bytes == 0
    assert models.bits_per_byte(as_arrays(PIECES)) == pytest.approx([8.0] * 4)


def test_pieces_do_not_run_into_each_other():
    """ "ab" then "cd" holds no "bc"; as one piece it does."""
    two = MarkovModels([array(b"ab"), array(b"cd")], 1)
    one = MarkovModels([array(b"abcd")], 1)
    asked = as_arrays([(b"b", b"c")])
    assert one.probabilities(asked)[1, 0] > two.probabilities(asked)[1, 0]
    assert two.probabilities(asked)[1, 0] == two.probabilities(asked)[0, 0]


def test_xz_is_per_file_and_as_good_as_the_preset():
    files = [bytes(range(256)) * 40, b"def f():\n    return 1\n" * 300]
    preset = [len(lzma.compress(f, preset=9 | lzma.PRESET_EXTREME)) for f in files]
    bits = xz_bits_per_byte(files)
    assert bits == pytest.approx(8 * sum(preset) / sum(map(len, files)), rel=0.02)
    assert bits > 8 * len(lzma.compress(b"".join(files), preset=9)) / sum(map(len, files))
