"""Bits per byte through the cache, against a whole forward pass without any."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from memtrain.decode.export import export_model
from memtrain.errors import BadInput
from memtrain.evaluate import bits
from memtrain.evaluate.reread import reread, reread_pieces
from memtrain.evaluate.run import evaluate
from memtrain.evaluate.subject import Subject
from memtrain.train.load import load_model

from .conftest import SEQ_LEN, direct_logits


def held_out_files(corpus, subject) -> list[bytes]:
    """Content of the files that were held out, from the disk."""
    return [(corpus / name).read_bytes() for name in subject.held_out().names]


def by_hand(run, files, without=()):
    """Nats of every byte of the files but the first, in pieces of 64 that know nothing before."""
    pieces = [
        content[begin : begin + SEQ_LEN + 1]
        for content in files
        for begin in range(0, len(content) - 1, SEQ_LEN)
    ]
    padded = np.array([list(piece[:-1].ljust(SEQ_LEN, b"\0")) for piece in pieces])
    logp = direct_logits(run, padded, without)
    return [
        [-logp[row, i, piece[i + 1]] for i in range(len(piece) - 1)]
        for row, piece in enumerate(pieces)
    ]


@pytest.fixture(scope="module")
def nats(run, corpus, subject):
    return by_hand(run, held_out_files(corpus, subject))


def test_bits_per_byte_by_hand(run, subject, nats):
    found = evaluate(run, task="bpb")
    every = np.concatenate(nats)
    assert found["tokens"] == len(every) == found["tokens_held_out"] - found["files"]
    assert found["bits_per_byte"] == pytest.approx(every.mean() / math.log(2), rel=1e-5)
    for row in found["by_position"]:
        inside = [n for piece in nats for n in piece[row["from"] : row["to"]]]
        assert row["tokens"] == len(inside)
        assert row["bits_per_byte"] == pytest.approx(np.mean(inside) / math.log(2), rel=1e-5)
    assert [row["from"] for row in found["by_position"]] == [0, 8, 16, 32]
    assert found["step"] == 16


def test_without_a_memory(run, corpus, subject, nats):
    found = evaluate(run, task="bpb", without=("product_key",))
    every = np.concatenate(by_hand(run, held_out_files(corpus, subject), [(0, "ffn")]))
    assert found["bits_per_byte"] == pytest.approx(every.mean() / math.log(2), rel=1e-5)
    assert abs(found["bits_per_byte"] - np.concatenate(nats).mean() / math.log(2)) > 1e-3


@pytest.mark.full
def test_an_artifact_measures_like_its_run(run, tmp_path, nats):
    loaded = load_model(run)
    assert loaded.tokenizer is not None
    out = tmp_path / "model.mtx"
    created = {"run": "tiny", "step": loaded.step}
    export_model(loaded.model, loaded.experiment, loaded.tokenizer, out, created, programs=False)
    found = evaluate(out, task="bpb")
    assert found["bits_per_byte"] == pytest.approx(
        np.concatenate(nats).mean() / math.log(2), rel=1e-5
    )


def test_other_data(run, tmp_path, corpus):
    text = (corpus / "cmd.py").read_bytes()[:200]
    (tmp_path / "other.txt").write_bytes(text)
    found = evaluate(run, task="bpb", data=(tmp_path / "other.txt",))
    every = np.concatenate(by_hand(run, [text]))
    assert found["tokens"] == 199
    assert found["bits_per_byte"] == pytest.approx(every.mean() / math.log(2), rel=1e-5)


def test_a_part_of_the_text_is_spread_evenly(subject):
    held_out = subject.held_out()
    every = bits.cut_pieces(held_out, SEQ_LEN, 1 << 30)
    some = bits.cut_pieces(held_out, SEQ_LEN, 10 * SEQ_LEN)
    assert len(some.tokens) == 10 and some.num_pieces == len(every.tokens) > 20
    places = set(zip(every.document.tolist(), every.begin.tolist(), strict=True))
    assert set(zip(some.document.tolist(), some.begin.tolist(), strict=True)) <= places
    assert set(some.document.tolist()) == set(range(len(held_out)))
    for row in range(10):
        text = held_out.tokens(int(some.document[row]))
        begin, count = int(some.begin[row]), int(some.valid[row].sum())
        assert (some.tokens[row, :count] == text[begin : begin + count]).all()
        assert (some.targets[row, :count] == text[begin + 1 : begin + count + 1]).all()
    long = 1500  # tokens: a file has one such piece, and the rest
    assert not bits.cut_pieces(held_out, long, long * len(held_out)).valid.all()
    assert bits.cut_pieces(held_out, long, long * len(held_out), whole=True).valid.all()
    more = bits.cut_pieces(held_out, long, long * (len(held_out) + 1), whole=True)
    assert more.valid.all(axis=1).sum() == len(held_out) == len(more.tokens) - 1
    history, wanted = some.in_bytes(held_out)[3]
    content, begin = held_out.content(int(some.document[3])), int(some.begin[3])
    assert content[begin + 1 :].startswith(wanted.tobytes())
    assert content[: begin + 1].endswith(history.tobytes()) and len(history)


def test_other_data_than_the_run_was_trained_on_is_refused(run, corpus, tmp_path):
    changed = Subject.open(run)
    data = dataclasses.replace(changed.experiment.data, path=(str(corpus / "ast.py"),))
    changed = dataclasses.replace(
        changed, experiment=dataclasses.replace(changed.experiment, data=data)
    )
    with pytest.raises(BadInput, match=r"data.content was .* is .*; or measure on other text"):
        changed.held_out()
    assert len(changed.held_out([corpus / "cmd.py"])) == 1


def test_reading_twice(run, subject):
    pieces = reread_pieces(subject.held_out(), SEQ_LEN, 5)
    assert pieces.shape == (5, SEQ_LEN // 2)
    found = reread(subject.engine(), pieces)
    logp = direct_logits(run, np.concatenate([pieces, pieces], axis=1))
    half = SEQ_LEN // 2
    for row in range(5):
        for at in range(1, half):
            first = -logp[row, at - 1, pieces[row, at]] / math.log(2)
            second = -logp[row, half + at - 1, pieces[row, at]] / math.log(2)
            assert found.first[row, at - 1] == pytest.approx(first, abs=2e-5)
            assert found.second[row, at - 1] == pytest.approx(second, abs=2e-5)


@pytest.mark.parametrize("length", [1, 5, 8, 9, 64, 100, 512, 600])
def test_position_edges_ascend_to_the_length(length):
    edges = bits.position_edges(length)
    assert edges[0] == 0 and edges[-1] == length
    assert all(a < b for a, b in itertools.pairwise(edges))


def test_the_task_reads_twice(run, subject):
    """The same numbers from a plain forward pass over the pieces, twice in a row."""
    found = evaluate(run, task="reread", max_tokens=4 * SEQ_LEN)
    assert found["pieces"] == 4 and found["tokens_per_piece"] == SEQ_LEN // 2
    pieces = reread_pieces(subject.held_out(), SEQ_LEN, 4)
    twice = np.concatenate([pieces, pieces], axis=1)
    logp = direct_logits(run, twice[:, :-1])
    each = -np.take_along_axis(logp, twice[:, 1:, None], axis=-1)[..., 0] / math.log(2)
    half = SEQ_LEN // 2
    first, second = each[:, : half - 1].mean(), each[:, half:].mean()
    np.testing.assert_allclose(found["bits_per_byte_first"], first, rtol=1e-4)
    np.testing.assert_allclose(found["bits_per_byte_second"], second, rtol=1e-4)
    np.testing.assert_allclose(found["second_over_first"], second / first, rtol=1e-4)


def test_a_context_longer_than_training(run, subject, corpus):
    """Pieces of four rows: the hits are those of a whole forward pass that knows as much before."""
    length = 4 * SEQ_LEN
    found = evaluate(run, task="bpb", context=length, max_tokens=2 * length)
    assert (
        found["context"] == found["longest_piece"] == length
        and found["by_position"][-1]["to"] == length
    )
    held_out = subject.held_out()
    pieces = bits.cut_pieces(held_out, length, 2 * length, whole=True)
    logp = direct_logits(run, pieces.tokens)
    nats = [
        -logp[row, i, target]
        for row, targets in enumerate(pieces.targets)
        for i, target in enumerate(targets)
        if pieces.valid[row, i]
    ]
    assert found["tokens"] == len(nats)
    assert found["bits_per_byte"] == pytest.approx(np.mean(nats) / math.log(2), rel=1e-5)
    with pytest.raises(BadInput, match="recall has rows of its own length"):
        evaluate(run, task="recall", context=length)


def test_joined_documents_stay_joined_where_other_text_is_given(run, subject, corpus):
    data = dataclasses.replace(subject.experiment.data, join_documents=True)
    joined = dataclasses.replace(subject.experiment, data=data)
    paths = [corpus / "cmd.py", corpus / "csv.py"]
    held_out = dataclasses.replace(subject, experiment=joined).held_out(paths)
    whole = b"".join(path.read_bytes() for path in paths)
    assert len(held_out) == 1 and held_out.content(0) == whole
