"""Kinds of tokens, against labels written by hand."""

import numpy as np
import pytest

from memtrain.evaluate import bits, kinds

from .conftest import SEQ_LEN


# k keyword, n name, o operator, d number, s string, c comment, . space. One letter a byte.
PYTHON = """\
if x_1 >= 10:  # \u00e9!
    return f"a{b}" + 'c'
"""
PYTHON_LABELS = """\
kk.nnn.oo.ddo..ccccc.\
....kkkkkk.sssonos.o.sss."""
# f begin of a word, r rest of it, d digit, p punctuation, . space
TEXT = "It's 42 na\u00efve_words.\n"
TEXT_LABELS = "frpf.dd.frrrrrrrrrrrp."


def test_python_kinds_by_hand():
    letters = {name: name[0] for name in kinds.PYTHON_KINDS}
    letters |= {"number": "d", "space, line end": "."}
    found = kinds.python_kinds(PYTHON.encode())
    assert found is not None
    assert "".join(letters[kinds.PYTHON_KINDS[kind]] for kind in found) == PYTHON_LABELS


def test_text_kinds_by_hand():
    found = kinds.text_kinds(TEXT.encode())
    assert "".join("frdp."[kind] for kind in found) == TEXT_LABELS


def test_what_python_cannot_read_has_no_kind():
    assert kinds.python_kinds(b"def f(:\n  'open\n") is None
    assert kinds.python_kinds(b"x = '\xff\xfe'\n") is None


def test_kinds_stand_at_their_targets(subject):
    held_out = subject.held_out()
    pieces = bits.cut_pieces(held_out, SEQ_LEN, 1 << 20)
    title, names, found = kinds.kinds_of(held_out, pieces)
    assert "Python" in title and names == kinds.PYTHON_KINDS
    assert (found[~pieces.valid] == -1).all()
    comments = found == names.index("comment")
    begins = comments & ~np.pad(comments, ((0, 0), (1, 0)))[:, :-1]
    assert begins[:, 1:].sum() > 3
    assert (pieces.targets[:, 1:][begins[:, 1:]] == ord("#")).all()
    spaces = pieces.targets[found == names.index("space, line end")]
    assert set(spaces.tolist()) <= {ord(c) for c in " \n\t\\"}


def test_bits_by_kind_is_the_mean_over_its_targets():
    rng = np.random.default_rng(0)
    of_target = rng.integers(-1, 3, (4, 9))
    nll = {"all": rng.random((4, 9)), "table": rng.random((4, 9))}
    rows = kinds.bits_by_kind(nll, of_target, ("a", "b", "c", "d"), 2.0)
    assert [row["kind"] for row in rows] == ["a", "b", "c"]
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    for index, row in enumerate(rows):
        for name, losses in nll.items():
            every = [losses[i, j] for i in range(4) for j in range(9) if of_target[i, j] == index]
            assert row[name] == pytest.approx(sum(every) / len(every) / np.log(2) / 2)
