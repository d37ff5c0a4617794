"""Recall at a distance: rows against the tasks' definitions, by search alone."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtrain.data.config import AssociativeTask, CopyTask, DataConfig
from memtrain.data.pipeline import GeneratedPipeline, build_pipeline
from memtrain.data.tasks.distant import AssociativeRows, CopyRows
from memtrain.errors import BadInput


KEYS = {"set_key": 3, "order_key": 4}


def answers(made) -> list[tuple[int, int, int]]:
    """(column, answer, distance) of each question."""
    batch, distances = made
    columns = np.flatnonzero(batch.loss_weights)
    assert np.array_equal(columns, np.flatnonzero(distances))
    return [(int(c), int(batch.targets[c]), int(distances[c])) for c in columns]


@given(
    copy_len=st.integers(1, 6),
    gap=st.integers(1, 8),
    more=st.integers(0, 9),
    slack=st.integers(0, 5),
    index=st.integers(0, 2**40),
)
def test_a_passage_is_told_and_asked_for_that_far_on(copy_len, gap, more, slack, index):
    low = copy_len + gap
    task = CopyTask(
        vocab_size=12, noise_tokens=3, copy_len=copy_len, min_distance=low, max_distance=low + more
    )
    made = CopyRows(task, copy_len + low + more + slack, **KEYS).held_out(index)
    tokens = made.batch.tokens.tolist()
    first, second = (i for i, token in enumerate(tokens) if token == 0)
    assert low <= second - first <= low + more
    passage = tokens[first + 1 : first + 1 + copy_len]
    assert all(4 <= token < 12 for token in passage)
    assert answers(made) == [(second + i, passage[i], second - first) for i in range(copy_len)]
    # What is read while the passage is said is the passage, and all else is noise.
    again = range(second + 1, min(second + copy_len + 1, len(tokens)))
    assert [tokens[i] for i in again] == passage[: len(again)]
    known = {first, second, *range(first + 1, first + 1 + copy_len), *again}
    assert all(1 <= tokens[i] <= 3 for i in set(range(len(tokens))) - known)


@given(
    num_pairs=st.integers(1, 6),
    gap=st.integers(0, 8),
    more=st.integers(0, 9),
    index=st.integers(0, 2**40),
)
def test_pairs_are_told_and_each_is_asked_once(num_pairs, gap, more, index):
    low, high = 2 * num_pairs + gap, 3 * num_pairs + gap + more
    task = AssociativeTask(
        vocab_size=4 + 2 * num_pairs + more,
        noise_tokens=3,
        num_pairs=num_pairs,
        min_distance=low,
        max_distance=high,
    )
    made = AssociativeRows(task, 2 * num_pairs + high, **KEYS).held_out(index)
    tokens = made.batch.tokens.tolist()
    keys, values = tokens[: 2 * num_pairs : 2], tokens[1 : 2 * num_pairs : 2]
    half = 4 + (task.vocab_size - 4) // 2
    assert len(set(keys)) == num_pairs
    assert all(4 <= key < half <= value for key, value in zip(keys, values, strict=True))
    found = answers(made)
    assert sorted(tokens[column] for column, _, _ in found) == sorted(keys)
    for column, answer, distance in found:
        told = keys.index(tokens[column])
        assert (answer, distance) == (values[told], column - 2 * told)
        assert low <= distance <= high
    asked = {column for column, _, _ in found}
    others = set(range(2 * num_pairs, len(tokens))) - asked
    assert all(1 <= tokens[i] <= 3 for i in others)


@pytest.mark.parametrize("task", ["copy", "associative"])
def test_distances_are_drawn_alike_between_their_bounds(task: str):
    of: Any = {"copy": CopyTask(copy_len=2), "associative": AssociativeTask(num_pairs=1)}[task]
    rows = {"copy": CopyRows, "associative": AssociativeRows}[task](of, 128, **KEYS)
    drawn = [answers(rows.held_out(index))[0][2] for index in range(1300)]
    counts = np.bincount(drawn, minlength=97)[32:97]
    assert counts.sum() == 1300 and counts.min() > 0
    statistic = ((counts - 20.0) ** 2 / 20.0).sum()
    assert statistic < 65 + 5 * np.sqrt(2 * 65)


@pytest.mark.parametrize("task", ["copy", "associative"])
def test_sets_are_fixed_apart_and_read_from_any_sample_on(task: str):
    of: Any = {"copy": CopyTask, "associative": AssociativeTask}[task](
        num_train=20, num_validation=8
    )

    def made(seed: int) -> GeneratedPipeline:
        config = DataConfig(**{task: of}, prefetch=0)
        pipeline = build_pipeline(config, seq_len=128, batch_size=4, seed=seed)
        assert isinstance(pipeline, GeneratedPipeline)
        return pipeline

    batches = made(0).batches(0)
    epochs = [[r.tobytes() for _ in range(5) for r in next(batches).tokens] for _ in range(2)]
    assert len(set(epochs[0])) == 20 and set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]
    resumed = next(made(0).batches(28)).tokens
    assert [r.tobytes() for r in resumed] == epochs[1][8:12]
    held_out = [r.tobytes() for b in made(1).validation_batches(9) for r in b.tokens]
    assert len(held_out) == 8 and not set(held_out) & set(epochs[0])
    asked = made(2).questions(0, 99)
    assert [r.tobytes() for r in asked.batch.tokens] == held_out
    assert made(0).fingerprint() != made(1).fingerprint()


BAD: dict[str, tuple[str, dict[str, int], int]] = {
    "data.copy.copy_len=0": ("copy", {"copy_len": 0}, 256),
    "data.copy.min_distance=16, max_distance=96: it takes 17": (
        "copy",
        {"min_distance": 16},
        256,
    ),
    "data.copy.vocab_size=10: a mark, noise_tokens=8 and two tokens to copy take 11": (
        "copy",
        {"vocab_size": 10},
        256,
    ),
    "train.seq_len=111: data.copy with copy_len=16 and max_distance=96 takes 112": (
        "copy",
        {},
        111,
    ),
    "data.associative.num_pairs=0": ("associative", {"num_pairs": 0}, 256),
    "data.associative.min_distance=12, max_distance=96: it takes 16": (
        "associative",
        {"min_distance": 12},
        256,
    ),
    "num_pairs=8 ask at places of their own; 39 or more": (
        "associative",
        {"max_distance": 38},
        256,
    ),
    "data.associative.vocab_size=24: num_pairs=8 and noise_tokens=8 take 25": (
        "associative",
        {"vocab_size": 24},
        256,
    ),
    "train.seq_len=110: data.associative with num_pairs=8 and max_distance=96 takes 111": (
        "associative",
        {},
        110,
    ),
    "data.associative.noise_tokens=0": ("associative", {"noise_tokens": 0}, 256),
    "data.copy.num_train and num_validation": ("copy", {"num_train": 0}, 256),
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_is_refused_with_what_could(message: str):
    name, fields, seq_len = BAD[message]
    task: Any = {"copy": CopyTask, "associative": AssociativeTask}[name](**fields)
    with pytest.raises(BadInput) as raised:
        build_pipeline(DataConfig(**{name: task}), seq_len=seq_len, batch_size=2)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(("task", "seq_len"), [("copy", 112), ("associative", 111)])
def test_the_shortest_row_that_is_allowed_holds_the_task(task: str, seq_len: int):
    of: Any = {"copy": CopyTask, "associative": AssociativeTask}[task]()
    rows = {"copy": CopyRows, "associative": AssociativeRows}[task](of, seq_len, **KEYS)
    for index in range(200):
        assert len(answers(rows.held_out(index))) == {"copy": 16, "associative": 8}[task]
