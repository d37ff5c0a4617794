"""Recall and MQAR: questions, answers, accuracy by distance."""

import dataclasses
import re
from itertools import pairwise

import numpy as np
import pytest

from memtrain.evaluate import generated, recall
from memtrain.evaluate.run import evaluate
from memtrain.evaluate.subject import Subject

from .conftest import SEQ_LEN, direct_logits


@pytest.fixture(scope="module")
def questions(subject):
    task = recall.task_of(subject)
    return recall.make_questions(task, subject.held_out(), length=SEQ_LEN, num_rows=24)


@pytest.mark.parametrize("times", [1, 3])
def test_every_answer_was_told_at_its_distance(subject, times):
    """Read off the text itself by a regular expression. Asking tells as well: what counts is the
    last time."""
    task = dataclasses.replace(recall.task_of(subject), num_facts=2, num_queries=2 * times)
    held_out = subject.held_out()
    questions = recall.make_questions(task, held_out, length=2 * SEQ_LEN, num_rows=24)
    wanted = []
    for row in range(24):
        text = bytes([*questions.tokens[row].tolist(), int(questions.targets[row, -1])])
        places: dict[bytes, list[int]] = {}
        for found in re.finditer(rb"@([a-z]{2})=([A-Z]{3})\n", text):
            places.setdefault(found[0], []).append(found.start(2))
        for lines in places.values():
            wanted += [(row, at - 1, 3, at - last) for last, at in pairwise(lines)]
    columns = (questions.row, questions.begin, questions.length, questions.distance)
    found = list(zip(*(column.tolist() for column in columns), strict=True))
    assert len(found) == 48 * times and sorted(found) == sorted(wanted)


def test_right_is_what_greedy_decoding_would_say(run, subject, questions):
    """A third of the questions is given the answers that the model would give itself."""
    best = direct_logits(run, questions.tokens).argmax(axis=-1)
    targets = questions.targets.copy()
    wanted = np.zeros(len(questions.row))
    for number, (row, begin) in enumerate(zip(questions.row, questions.begin, strict=True)):
        answer = slice(begin, begin + 3)
        if number % 3 == 0:
            targets[row, answer] = best[row, answer]
        elif number % 3 == 1:
            targets[row, begin + 1] = best[row, begin + 1]
        wanted[number] = np.mean(targets[row, answer] == best[row, answer])
    asked = recall.Questions(
        questions.tokens,
        targets,
        questions.valid,
        questions.row,
        questions.begin,
        questions.length,
        questions.distance,
    )
    right, share = recall.answer(subject.engine(), asked)
    np.testing.assert_allclose(share, wanted)
    assert right.tolist() == (wanted == 1).tolist()
    assert right[::3].all() and not right.all()


def test_accuracy_by_distance_counts_each_question_once():
    rng = np.random.default_rng(0)
    distance = rng.integers(8, 64, 200)
    share = rng.integers(0, 4, 200) / 3
    rows = recall.accuracy_by_distance(share == 1, share, distance, 64)
    assert sum(row["questions"] for row in rows) == 200
    for row in rows:
        inside = [i for i in range(200) if row["from"] <= distance[i] < row["to"]]
        assert row["questions"] == len(inside)
        assert row["accuracy"] == pytest.approx(sum(share[i] == 1 for i in inside) / len(inside))
        assert row["token_accuracy"] == pytest.approx(sum(share[i] for i in inside) / len(inside))
    assert [row["from"] for row in rows] == [0, 16, 32]


def test_recall_task(run):
    found = evaluate(run, task="recall")
    assert found["questions"] == 2 * 128 and found["trained_on_recall"]
    assert found["chance"] == pytest.approx(26**-3)
    assert found == evaluate(run, task="recall")


def test_mqar_is_compared_with_a_whole_pass(mqar_run):
    subject = Subject.open(mqar_run)
    questions = generated.task_questions(subject, "mqar", 12 * 16)
    assert questions.tokens.shape == (12, 16)
    logp = direct_logits(mqar_run, questions.tokens)
    wanted, distances = [], []
    for row in range(12):
        tokens = questions.tokens[row].tolist()
        for column in range(4, 16):
            if tokens[column]:
                told = tokens.index(tokens[column])
                assert questions.targets[row, column] == tokens[told + 1]
                assert questions.distances[row, column] == column - told
                wanted.append(logp[row, column].argmax() == tokens[told + 1])
                distances.append(column - told)
    right = generated.answer_task(subject.engine(), questions)
    assert len(wanted) == 24 and right.tolist() == wanted
    rows = generated.accuracy_by_distance(np.arange(24) % 2 == 0, questions)
    assert sum(row["questions"] for row in rows) == 24
    for row in rows:
        inside = [i for i, d in enumerate(distances) if row["from"] <= d < row["to"]]
        assert row["accuracy"] == pytest.approx(np.mean([i % 2 == 0 for i in inside]))
    found = evaluate(mqar_run, task="mqar")
    assert found["questions"] == 40 and 0 <= found["accuracy"] <= 1
