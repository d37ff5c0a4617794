import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from memtrain.data.batch import Batch
from memtrain.data.config import DataConfig, MqarTask, RecallTask
from memtrain.data.fingerprint import check_fingerprint
from memtrain.data.pipeline import Pipeline, TextPipeline, build_pipeline
from memtrain.errors import BadInput


RECALL = RecallTask(share=0.3, num_facts=2, num_queries=1, name_len=1, value_len=2)
VARIANTS = {
    "packed": {},
    "document": {"order": "document"},
    "mixed": {"recall": RECALL},
    "mqar": {"mqar": MqarTask(num_pairs=2, num_train=37, num_validation=10)},
    "no thread": {"prefetch": 0},
}


def make(books: str, *, seed: int = 0, batch_size: int = 4, **fields) -> Pipeline:
    config = DataConfig(path=(books,), validation_fraction=0.2, **fields)
    return build_pipeline(config, seq_len=64, batch_size=batch_size, seed=seed)


def text_of(books: str, **arguments) -> TextPipeline:
    pipeline = make(books, **arguments)
    assert isinstance(pipeline, TextPipeline)
    return pipeline


def take(batches: Iterator[Batch], count: int) -> list[Batch]:
    return list(islice(batches, count))


def same(a: Batch, b: Batch) -> bool:
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def joined(parts: tuple[Batch, ...]) -> Batch:
    return Batch(*(np.concatenate(leaves) for leaves in zip(*parts, strict=True)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_started_again_anywhere_reads_on_exactly(books: str, variant: str):
    pipeline = make(books, **VARIANTS[variant])
    steps = 2 + 2 * pipeline.rows_per_epoch // 4
    whole = take(pipeline.batches(0), steps)
    assert len({b.tokens.tobytes() for b in whole[: pipeline.rows_per_epoch // 4]}) > 5
    again = make(books, **VARIANTS[variant])
    for step in range(steps):
        (batch,) = take(again.batches(4 * step), 1)
        assert same(batch, whole[step])
    # From the middle of a batch too, for runs whose batch was another.
    rows = [Batch(*leaves) for b in whole for leaves in zip(*b, strict=True)]
    for row, sample in zip(take(again.batches(5), 1)[0].tokens, rows[5:], strict=False):
        assert np.array_equal(row, sample.tokens)


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_number_of_processes_reads_the_same(books: str, variant: str):
    pipeline = make(books, **VARIANTS[variant])
    whole = take(pipeline.batches(8), 12)
    held_out = pipeline.validation_batches(3)
    for count in (2, 4):
        parts = [
            take(pipeline.batches(8, process_index=p, process_count=count), 12)
            for p in range(count)
        ]
        for batch, *pieces in zip(whole, *parts, strict=True):
            assert pieces[0].tokens.shape == (4 // count, 64)
            assert same(joined(tuple(pieces)), batch)
        shares = [pipeline.validation_batches(3, p, count) for p in range(count)]
        for batch, *pieces in zip(held_out, *shares, strict=True):
            assert same(joined(tuple(pieces)), batch)


def test_the_rows_of_an_epoch_give_back_the_texts(books: str):
    pipeline = text_of(books)
    epoch = take(pipeline.batches(0), -(-pipeline.rows_per_epoch // 4))
    rows = [Batch(*r) for b in epoch for r in zip(*b, strict=True)][: pipeline.rows_per_epoch]
    held_out = {name for name, _ in pipeline.validation_documents()}
    texts = [p.read_bytes() for p in sorted(Path(books).iterdir()) if p.name not in held_out]
    assert held_out and len(texts) + len(held_out) == 20
    for row in rows:
        for piece in np.split(row.tokens[row.valid], np.flatnonzero(row.starts[row.valid])):
            assert any(bytes(piece.tolist()) in text for text in texts)
    read = Counter(int(token) for row in rows for token in row.tokens[row.valid])
    missing = Counter(b"".join(texts)) - read
    assert missing.total() == 1 and not read - Counter(b"".join(texts))


def test_held_out_documents_are_never_trained_on(books: str):
    pipeline = text_of(books, recall=RECALL)
    held_out = pipeline.validation_documents()
    for name, tokens in held_out:
        assert (Path(books) / name).read_bytes() == bytes(tokens.tolist())
    # The books number their lines, so each line tells its book.
    trained = {
        line[:3]
        for batch in take(pipeline.batches(0), pipeline.rows_per_epoch // 2)
        for row in batch.tokens
        for line in bytes(row.tolist()).split(b"\n")
        if len(line) == len(b"00:000 the line")
    }
    held = {name[4:6].encode() + b":" for name, _ in held_out}
    assert trained and held and not trained & held
    read = b"".join(
        bytes(row[valid].tolist())
        for batch in pipeline.validation_batches(10**6)
        for row, valid in zip(batch.tokens, batch.valid, strict=True)
    )
    assert len(read) == sum(len(tokens) for _, tokens in held_out) - 1
    assert all(read.count(book) > 0 for book in held)


def test_validation_is_the_same_whatever_the_seeds(books: str):
    reference = make(books).validation_batches(4)
    assert len(reference) == 4
    for other in (make(books, seed=1), make(books, recall=RECALL), make(books)):
        for a, b in zip(other.validation_batches(4), reference, strict=True):
            assert same(a, b)
    assert not same(take(make(books, seed=1).batches(), 1)[0], take(make(books).batches(), 1)[0])


def test_few_held_out_rows_fill_one_batch_with_padding(texts: Callable[..., str]):
    pipeline = make(texts(a="x" * 300, b="y" * 70), batch_size=64)
    (batch,) = pipeline.validation_batches(5)
    assert batch.tokens.shape == (64, 64)
    assert int(batch.valid.sum()) in (69, 299)
    assert not batch.loss_weights[~batch.valid].any()
    config = DataConfig(path=(texts(a="x" * 300),), validation_fraction=0)
    assert build_pipeline(config, seq_len=64, batch_size=4).validation_batches(5) == []


def test_text_read_is_what_the_samples_hold(books: str):
    for fields in ({}, {"recall": RECALL}, {"order": "document"}):
        pipeline = text_of(books, **fields)
        # With a task mixed in, plain rows stand in for its rows: as if there were none.
        plain = text_of(books, **{name: v for name, v in fields.items() if name != "recall"})
        expected = [
            bytes(row[valid].tolist())
            for batch in take(plain.batches(0), 6)
            for row, valid in zip(batch.tokens, batch.valid, strict=True)
        ]
        read = [piece.tobytes() for piece in pipeline.text_read(24)]
        assert b"".join(read) == b"".join(expected)
        assert all(piece.dtype == np.uint8 for piece in pipeline.text_read(24))
        if fields == {}:
            once = sum(map(len, pipeline.text_read(pipeline.rows_per_epoch)))
            assert once == pipeline.train_documents().num_tokens - 1


def test_the_share_of_recall_rows(books: str):
    pipeline = text_of(books, recall=RECALL)
    batches = take(pipeline.batches(0), 100)
    recalled = [b"@" in bytes(row.tolist()) for b in batches for row in b.tokens]
    assert abs(sum(recalled) - 0.3 * 400) <= 1


def test_the_background_thread_ends_with_the_iterator(books: str):
    before = set(threading.enumerate())
    batches = make(books).batches(0)
    take(batches, 2)
    assert set(threading.enumerate()) - before
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def test_fingerprint_names_whatever_changes_what_is_read(books: str, texts: Callable[..., str]):
    fingerprint = make(books).fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    check_fingerprint(fingerprint, make(books, prefetch=1).fingerprint())

    config = DataConfig(path=(books,), validation_fraction=0.2)
    changes = {
        "data.order": make(books, order="document"),
        "data.seed": build_pipeline(
            DataConfig(path=(books,), validation_fraction=0.2, seed=3), seq_len=64, batch_size=4
        ),
        "train.seed": make(books, seed=9),
        "train.batch_size": make(books, batch_size=8),
        "train.seq_len": build_pipeline(config, seq_len=32, batch_size=4),
        "data.recall": make(books, recall=RECALL),
        "data.content": make(texts("other", a="x" * 600, b="y" * 400)),
        "data.mqar": make(books, mqar=MqarTask(num_pairs=2)),
        "data.validation_fraction": build_pipeline(
            DataConfig(path=(books,), validation_fraction=0.3), seq_len=64, batch_size=4
        ),
    }
    for name, changed in changes.items():
        with pytest.raises(BadInput, match=name) as raised:
            check_fingerprint(fingerprint, changed.fingerprint())
        assert "\n" not in str(raised.value)
        if name != "data.mqar":
            others = set(changes) - {name}
            assert not [other for other in others if other in str(raised.value)]


def test_a_corpus_moved_elsewhere_is_the_same_corpus(books: str, tmp_path: Path):
    before = make(books).fingerprint()
    moved = tmp_path / "moved"
    Path(books).rename(moved)
    check_fingerprint(before, make(str(moved)).fingerprint())
    (moved / "book03.txt").write_text("changed " * 40)
    with pytest.raises(
        BadInput, match=r"data\.content was '[0-9a-f]+\.\.\.', is '[0-9a-f]+\.\.\.'"
    ):
        check_fingerprint(before, make(str(moved)).fingerprint())


BAD = {
    "train.seq_len=5000": {"seq_len": 5000},
    "train.batch_size=0": {"batch_size": 0},
    "data.validation_fraction=1": {"validation_fraction": 1},
    "data.order='sorted'": {"order": "sorted"},
    "data.prefetch=-1": {"prefetch": -1},
    "train.batch_size=500": {"batch_size": 500, "order": "document"},
    'data.order="packed"': {"recall": RECALL, "order": "document"},
    "data.mqar goes neither": {"recall": RECALL, "mqar": MqarTask()},
}


@pytest.mark.parametrize("message", BAD)
def test_settings_that_cannot_be_are_refused_in_one_line(books: str, message: str):
    fields = dict(BAD[message])
    seq_len, batch_size = fields.pop("seq_len", 64), fields.pop("batch_size", 4)
    with pytest.raises(BadInput) as raised:
        build_pipeline(DataConfig(path=(books,), **fields), seq_len=seq_len, batch_size=batch_size)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_batch_must_divide_over_the_processes(books: str):
    with pytest.raises(BadInput, match=r"train\.batch_size=4 does not divide over 3 processes"):
        next(make(books).batches(0, process_count=3))
    with pytest.raises(BadInput, match="divide"):
        make(books).validation_batches(1, 0, 3)


def test_mqar_has_no_text(books: str):
    pipeline = make(books, mqar=MqarTask(num_pairs=2))
    assert pipeline.vocab_size == 8192 and pipeline.tokenizer is None
    for ask in (
        pipeline.validation_documents,
        lambda: pipeline.text_read(1),
        lambda: pipeline.bytes_per_token("train"),
    ):
        with pytest.raises(BadInput, match=r"data\.mqar reads no text"):
            ask()


def test_joined_documents_fill_rows_longer_than_any_of_them(books: str):
    longest = max(file.stat().st_size for file in Path(books).iterdir())
    config = DataConfig(path=(books,), join_documents=True)
    pipeline = build_pipeline(config, seq_len=longest + 100, batch_size=1)
    batch = next(pipeline.batches(0))
    assert batch.valid.all() and batch.starts.sum() == 1
    np.testing.assert_array_equal(batch.positions[0], np.arange(longest + 100))
    apart = build_pipeline(DataConfig(path=(books,)), seq_len=longest + 100, batch_size=1)
    assert apart.fingerprint() != pipeline.fingerprint()
