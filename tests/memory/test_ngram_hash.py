"""The addresses of n-grams against Python's own integers, on the host and on the device."""

import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compiled
from ngram_oracle import addresses, next_primes, row_of

from memtrain.errors import BadInput
from memtrain.memory import NGramMemoryConfig
from memtrain.memory.ngram_hash import NGramHash, canonical_ids, look_back, product, remainder


LARGEST = 2**31 - 1


def python_addresses(hashing: NGramHash, ids: list[int], documents: list[int]) -> np.ndarray:
    return addresses(
        ids,
        documents,
        orders=hashing.orders,
        heads=hashing.num_heads,
        slots=hashing.num_slots,
        seed=hashing.seed,
    )


SIZES = [
    NGramHash((2, 3), 2, 5, seed=3),
    NGramHash((4, 2), 3, 2**16),
    NGramHash((1, 5), 2, 2**24 + 1, seed=1),
    NGramHash((2,), 1, 2**31 - 10),
]


@pytest.mark.parametrize("hashing", SIZES, ids=lambda h: str(h.num_slots))
def test_addresses_are_those_of_python_integers(hashing):
    rng = np.random.default_rng(0)
    documents = np.array([[0] * 5 + [1] + [2] * 7, [-1, -1] + [0] * 4 + [1] * 3 + [-1] * 4])
    valid = documents >= 0
    starts = np.diff(documents, axis=1, prepend=-1) > 0
    ids = rng.integers(0, LARGEST, documents.shape, np.int32, endpoint=True)
    ids[:, 3:5], ids[0, 8:10] = LARGEST, 0
    want = np.stack(
        [python_addresses(hashing, ids[r].tolist(), documents[r].tolist()) for r in range(2)]
    )
    host = hashing.addresses(ids, starts, valid)
    assert isinstance(host, np.ndarray) and host.dtype == np.int32
    np.testing.assert_array_equal(host, want)
    device = compiled(hashing.addresses)(jnp.asarray(ids), jnp.asarray(starts), jnp.asarray(valid))
    assert device.dtype == jnp.int32
    np.testing.assert_array_equal(device, want)


def test_products_and_remainders_are_exact():
    rng = np.random.default_rng(1)
    edge = np.array([0, 1, 0xFFFF, 0x10000, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1], np.uint32)
    words = np.concatenate([edge, rng.integers(0, 2**32, 200, np.uint32)])
    for by in (1, 0xFFFF, 0x10001, 2**31 + 1, 2**32 - 1, 3_000_000_019):
        high, low = product(words, by)
        found = [(int(h) << 32) + int(w) for h, w in zip(high, low, strict=True)]
        assert found == [int(w) * by for w in words]
        on_device = compiled(lambda words, by=by: product(words, by))(jnp.asarray(words))
        np.testing.assert_array_equal(on_device, [high, low])
    low = rng.permutation(words)
    whole = [(int(h) << 32) + int(w) for h, w in zip(words, low, strict=True)]
    for primes in ([2, 3], [65_521, 65_537], [16_777_259], [2_147_483_629, 2_147_483_647]):
        of = lambda high, low, p=primes: remainder(high, low, np.array(p, np.uint32))  # noqa: E731
        want = [[w % p for p in primes] for w in whole]
        assert of(words, low).tolist() == want
        np.testing.assert_array_equal(compiled(of)(jnp.asarray(words), jnp.asarray(low)), want)


def test_the_hash_is_for_ever():
    """A trained table is read by these numbers: another hash would scramble every artifact."""
    ids, starts = np.array([[104, 101, 108, 108, 111]], np.int32), np.eye(1, 5, dtype=bool)
    hashing = NGramMemoryConfig(num_slots=1000, orders=(2, 3), num_heads=2).hashing
    assert hashing.primes == (1009, 1013, 1019, 1021)
    assert hashing.offsets == (0, 1009, 2022, 3041)
    assert hashing.num_rows == 4096  # 4,062, up to a multiple of 1,024
    assert hashing.multipliers(2) == (3704681545, 2395595923)
    # (h, nothing): 105 * 3704681545 = 388,991,562,225 = 385,521,865 * 1009 + 440
    assert hashing.addresses(ids, starts)[0, 0, 0] == 388_991_562_225 % 1009 == 440
    np.testing.assert_array_equal(hashing.addresses(ids, starts)[0], PINNED)
    np.testing.assert_array_equal(python_addresses(hashing, ids[0].tolist(), [0] * 5), PINNED)


PINNED = [
    [440, 1863, 2844, 3940],
    [91, 1504, 2611, 3437],
    [725, 1837, 2168, 3280],
    [759, 2015, 2575, 3240],
    [659, 1580, 2047, 3380],
]


@pytest.mark.parametrize("least", [1, 2, 90, 1_000, 2**20, 2**30])
def test_parts_are_the_next_primes_all_different(least):
    assert list(NGramHash((2, 3), 2, least).primes) == next_primes(least, 4)


def test_addresses_do_not_depend_on_the_cut():
    """The ids that are carried are all that the next call must know."""
    rng = np.random.default_rng(2)
    hashing = NGramHash((2, 4), 2, 50)
    starts = rng.random((6, 24)) < 0.2
    starts[:3, 0] = True  # others go on with what came before, here nothing
    valid = np.arange(24) < rng.integers(1, 25, (6, 1))
    ids = rng.integers(0, 90, (6, 24), np.int32)
    whole = hashing.addresses(ids, starts, valid)
    for cut in ([1] * 24, [2, 1, 3, 5, 13], [23, 1]):
        at, before, parts = 0, None, []
        for n in cut:
            piece = [a[:, at : at + n] for a in (ids, starts, valid)]
            parts.append(hashing.addresses(*piece, before=before))
            _, before = look_back(*piece, size=4, before=before)
            at += n
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_ids_out_of_range_are_refused_on_the_host_and_nothing_on_the_device():
    hashing = NGramHash((2,), 1, 50, vocab_size=10)
    starts = np.eye(1, 3, dtype=bool)
    for wrong in (10, -1, LARGEST):
        ids = np.array([[4, wrong, 5]], np.int32)
        with pytest.raises(BadInput, match=rf"token id {wrong}: .* takes ids from 0 to 9"):
            hashing.addresses(ids, starts)
        hashing.addresses(ids, starts, np.array([[True, False, True]]))  # of padding, anything
        found = hashing.addresses(jnp.asarray(ids), jnp.asarray(starts))
        want = [row_of(ngram, 53) for ngram in ([4, None], [None, 4], [5, None])]
        assert found[0, :, 0].tolist() == want


def test_tokens_that_read_alike_have_one_canonical_id():
    pieces = ["the", " The", "THE\n", "cat", "é", "E", "ﬁ", "FI", " ", "\t\n", "", "-"]
    found = canonical_ids([*(p.encode() for p in pieces), b"\xc3", b"\xa9", b"\xc3"])
    assert found == (0, 0, 0, 1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8, 7)
    config = NGramMemoryConfig(num_slots=100, num_heads=1, compression=found)
    assert config.hashing.vocab_size == 15
    ids = np.array([[3, 1, 3, 2]], np.int32)
    rows = config.hashing.addresses(ids, np.eye(1, 4, dtype=bool))
    # cat, the, cat, the: the last pair is that of tokens 0 and 1, whatever its spelling.
    assert rows[0, 1, 0] == rows[0, 3, 0] != rows[0, 2, 0]


def test_every_row_is_used_about_alike():
    """Bytes, of which all pairs occur: no row has more than a fair share of them by much."""
    first, second = np.divmod(np.arange(2**16), 2**8)
    pairs = np.stack([first, second], axis=1).astype(np.int32)
    starts = np.zeros(pairs.shape, bool)
    starts[:, 0] = True
    hashing = NGramHash((2,), 4, 4096)
    rows = hashing.addresses(pairs, starts)[:, 1]
    for head in range(4):
        counts = np.bincount(rows[:, head] - hashing.offsets[head], minlength=4096)
        # Of a hash drawn at random, sqrt(mean); of one that leaves rows out, far more.
        assert counts.std() < 1.1 * np.sqrt(counts.mean())
    # Two pairs that share a row under one prime are told apart by the others.
    assert len(np.unique(rows, axis=0)) == 2**16
