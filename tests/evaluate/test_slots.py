"""What is read from a table, against the reads of a whole pass."""

import numpy as np
import pytest

from memtrain.evaluate import bits, slots

from .conftest import SEQ_LEN, direct_logits


@pytest.fixture(scope="module")
def pieces(subject):
    return bits.cut_pieces(subject.held_out(), SEQ_LEN, 12 * SEQ_LEN)


@pytest.fixture(scope="module")
def reads(subject, pieces):
    (found,) = slots.record_reads(subject, pieces, 1 << 20)
    return found


def test_reads_are_those_of_a_whole_pass(run, pieces, reads):
    found = direct_logits(run, pieces.tokens, reads=True)
    assert (reads.table, reads.num_slots) == ("memory", 64)
    mass = np.zeros(64)
    for row, column in zip(*np.nonzero(pieces.valid), strict=True):
        for slot, weight in zip(
            found["slots"][row, column], found["weights"][row, column], strict=True
        ):
            mass[slot] += weight
    np.testing.assert_allclose(reads.mass, mass, rtol=1e-4, atol=1e-4)
    assert mass.sum() == pytest.approx(2 * pieces.num_targets, rel=1e-5)  # two heads


def test_slots_are_shown_where_they_fire(subject, pieces, reads):
    top, specific = slots.most_read(reads, pieces, subject.tokenizer, num_read=3, num_specific=3)
    mass = reads.mass
    order = np.argsort(-mass, kind="stable")
    assert [slot.slot for slot in top] == order[:3].tolist()
    assert top[0].share == pytest.approx(mass.max() / mass.sum())
    assert not {slot.slot for slot in top} & {slot.slot for slot in specific}
    every = "\n\n".join(bytes(row).decode("latin-1") for row in pieces.tokens.astype(np.uint8))
    for slot in [*top, *specific]:
        inside = reads.slot == slot.slot
        assert slot.firings[0].weight == pytest.approx(reads.weight[inside].max())
        weights = [firing.weight for firing in slot.firings]
        assert weights == sorted(weights, reverse=True)
        by_context: dict[bytes, float] = {}
        for row, column, weight in zip(
            reads.row[inside], reads.column[inside], reads.weight[inside], strict=True
        ):
            text = bytes(pieces.tokens[row, max(0, column - 2) : column + 1].astype(np.uint8))
            by_context[text] = by_context.get(text, 0) + float(weight)
        share = max(by_context.values()) / sum(by_context.values())
        assert slot.specificity == pytest.approx(share, rel=1e-5)
        for firing in slot.firings:
            assert firing.before + firing.at + firing.after in every
            assert len(firing.at) == 1
