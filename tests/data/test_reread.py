"""Rows in which a passage comes again."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtrain.data.config import DataConfig, RecallTask, RereadTask
from memtrain.data.corpus import Documents
from memtrain.data.pipeline import TextPipeline, build_pipeline
from memtrain.data.tasks.reread import RereadRows
from memtrain.errors import BadInput


def documents(*lengths: int) -> Documents:
    """Every token its own place in the corpus, so that a second copy can be told by its numbers."""
    ends = np.cumsum(lengths)
    return Documents(np.arange(ends[-1], dtype=np.int32), ends - lengths, ends)


@given(
    seq_len=st.integers(3, 40),
    min_len=st.integers(1, 20),
    index=st.integers(0, 2**40),
    lengths=st.lists(st.integers(15, 60), min_size=3, max_size=5),
)
def test_one_passage_comes_twice_and_nothing_else(seq_len, min_len, index, lengths):
    min_len = min(min_len, (seq_len + 1) // 2)
    corpus = documents(*lengths)
    rows = RereadRows(RereadTask(min_len=min_len), corpus, seq_len, key=5)
    row = rows.row(index)
    np.testing.assert_array_equal(row.tokens, rows.row(index).tokens)
    np.testing.assert_array_equal(row.tokens[1:], row.targets[:-1])
    assert row.valid.all() and row.positions.tolist() == list(range(seq_len))
    assert np.flatnonzero(row.starts).tolist() == [0]

    whole = [*row.tokens.tolist(), int(row.targets[-1])]
    first_at = {token: whole.index(token) for token in whole}
    again = [i for i, token in enumerate(whole) if first_at[token] != i]
    assert again == list(range(again[0], again[-1] + 1)), "the second copy is one piece"
    copied = [whole[i] for i in again]
    begin = first_at[copied[0]]
    assert whole[begin : begin + len(again)] == copied
    assert begin + len(again) <= again[0], "the two do not overlap"
    assert min_len <= len(again) <= (seq_len + 1) // 2

    # What cannot be known has no weight: the copy's first token, the first after it, and where a
    # document begins (in the first reading and in the second).
    unknown = {again[0], again[-1] + 1}
    begins = set(corpus.begins.tolist())
    for i in range(1, seq_len + 1):
        known = i not in unknown and whole[i] not in begins
        assert row.loss_weights[i - 1] == float(known), f"target {i}"


def test_passages_are_of_all_lengths_and_places():
    rows = RereadRows(RereadTask(min_len=4), documents(500, 700), 63, key=1)
    lengths, gaps = [], []
    for index in range(300):
        row = rows.row(index)
        whole = [*row.tokens.tolist(), int(row.targets[-1])]
        again = [i for i, token in enumerate(whole) if whole.index(token) != i]
        lengths.append(len(again))
        gaps.append(again[0] - whole.index(whole[again[0]]))
    assert min(lengths) == 4 and max(lengths) == 32
    assert len(set(lengths)) == 29
    assert min(gaps) < 12 and max(gaps) > 40


def test_shares_are_kept_beside_recall_and_text(texts: Callable[..., str]):
    novels = {
        name: "".join(f"{name} line {i}: word {i * i} end.\n" for i in range(900))
        for name in ("anna", "bleak", "candide")
    }
    config = DataConfig(
        path=(texts(**novels),),
        recall=RecallTask(share=0.25, num_facts=2, num_queries=2),
        reread=RereadTask(share=0.5),
        validation_fraction=0.0,
    )
    made = build_pipeline(config, seq_len=128, batch_size=4)
    assert isinstance(made, TextPipeline)
    batches = made.batches()
    kinds = {"recall": 0, "reread": 0, "text": 0}
    for _ in range(25):
        batch = next(batches)
        for row in range(4):
            text = bytes(batch.tokens[row].tolist())
            lines = text.split(b"\n")[1:-1]
            is_recall = any(line.startswith(b"@") for line in lines)
            half = batch.tokens[row].astype(np.uint8).tobytes()
            twice = any(half.count(half[i : i + 24]) > 1 for i in range(len(half) - 24))
            kinds["recall" if is_recall else "reread" if twice else "text"] += 1
    assert kinds == {"recall": 25, "reread": 50, "text": 25}


BAD: dict[str, dict[str, Any]] = {
    "data.reread.share=0": {"reread": RereadTask(share=0.0)},
    "data.reread take 1 of the rows": {"reread": RereadTask(share=1.0)},
    "data.reread.min_len=0": {"reread": RereadTask(min_len=0)},
    "data.reread.min_len=65": {"reread": RereadTask(min_len=65)},
    "data.recall and data.reread take 1.1": {
        "recall": RecallTask(share=0.6, num_facts=2, num_queries=2),
        "reread": RereadTask(share=0.5),
    },
    'data.reread takes data.order="packed"': {"reread": RereadTask(), "order": "document"},
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_is_refused_by_name(texts: Callable[..., str], message: str):
    path = texts(anna="a line of text\n" * 200)
    with pytest.raises(BadInput) as found:
        build_pipeline(DataConfig(path=(path,), **BAD[message]), seq_len=128, batch_size=4)
    assert message in str(found.value)
