"""Tasks instead of text, through the decode path."""

import dataclasses

import numpy as np
import pytest

from memtrain.data.config import AssociativeTask, CopyTask, DataConfig, FactsTask, MqarTask
from memtrain.errors import BadInput
from memtrain.evaluate import generated
from memtrain.evaluate.report import report
from memtrain.evaluate.run import evaluate
from memtrain.evaluate.subject import Subject

from .conftest import direct_logits


def test_facts_in_a_row_are_read_one_without_the_other(facts_run):
    """Each fact as a row of its own, through the training path, is answered alike."""
    subject = Subject.open(facts_run)
    assert subject.tokenizer is None
    questions = generated.task_questions(subject, "facts", 1000)
    rows, columns = np.nonzero(questions.asked)
    assert len(rows) == 37
    alone = np.stack(
        [questions.tokens[r, c - 2 : c + 1] for r, c in zip(rows, columns, strict=True)]
    )
    wanted = direct_logits(facts_run, alone)[:, -1].argmax(-1) == questions.targets[rows, columns]
    right = generated.answer_task(subject.engine(), questions)
    assert right.tolist() == wanted.tolist()
    found = evaluate(facts_run, task="facts")
    assert found["questions"] == 37 and found["chance"] == 0.25
    assert found["accuracy"] == pytest.approx(wanted.mean())
    assert "by_distance" not in found
    part = evaluate(facts_run, task="facts", max_tokens=21)
    assert part["questions"] == 6 and part["accuracy"] == pytest.approx(wanted[:6].mean())


def test_other_facts_than_were_taught_are_asked_for(facts_run):
    taught = evaluate(facts_run, task="facts", settings=["data.facts.num_facts=10"])
    assert taught["questions"] == 10 and taught["settings"] == ["data.facts.num_facts=10"]
    first = generated.task_questions(Subject.open(facts_run), "facts", 1000)
    settings = ["data.facts.num_facts=7", "data.facts.first_fact=10"]
    later = generated.task_questions(Subject.open(facts_run, settings), "facts", 1000)
    np.testing.assert_array_equal(later.targets[later.asked], first.targets[first.asked][10:17])
    for setting, message in (
        ("train.seed=1", "settings stand, but for those of a task .*data.facts.KEY=VALUE"),
        ("data.facts.num_values=999", "the data has .* token ids, and the model knows"),
        ("data.facts.num_fact=1", "num_facts"),
    ):
        with pytest.raises(BadInput, match=message):
            evaluate(facts_run, task="facts", settings=[setting])


def test_a_model_without_a_tokenizer_reads_no_text(facts_run):
    """As `memtrain import` makes one of a folder that has none."""
    subject = Subject.open(facts_run)
    experiment = dataclasses.replace(subject.experiment, data=DataConfig())
    imported = dataclasses.replace(subject, experiment=experiment)
    with pytest.raises(BadInput, match=r"has no tokenizer, and reads no text: import it from"):
        imported.need_tokenizer("bpb")


def test_rows_of_another_length(facts_run):
    """Twice as many facts in a row; each is read without the others, so answers are the same."""
    every = evaluate(facts_run, task="facts")
    subject = Subject.open(facts_run)
    length = 2 * subject.experiment.train.seq_len
    longer = evaluate(facts_run, task="facts", context=length)
    assert longer["questions"] == every["questions"]
    assert longer["accuracy"] == pytest.approx(every["accuracy"])
    asked = dataclasses.replace(subject, context_tokens=length)
    assert generated.task_questions(asked, "facts", 1000).tokens.shape[1] == length


def test_facts_are_reported_without_distances(facts_run):
    found = report(facts_run, say=lambda line: None)
    assert (facts_run / "report.html").exists() and found


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("mqar", "was not trained on data.mqar: take --task facts"),
        ("recall", "numbers and no text: take --task facts"),
        ("bpb", "numbers and no text: take --task facts"),
    ],
)
def test_a_task_that_was_not_trained_names_the_one_that_was(facts_run, task, message):
    with pytest.raises(BadInput, match=message):
        evaluate(facts_run, task=task)


def test_chance_is_one_of_the_answers_that_can_be():
    assert generated.chance_of(FactsTask(num_values=10)) == 0.1
    assert generated.chance_of(MqarTask(vocab_size=64)) == 1 / 32
    assert generated.chance_of(CopyTask(vocab_size=20, noise_tokens=3)) == 1 / 16
    # Ids 4 to 9 are keys and 10 to 16 values.
    assert generated.chance_of(AssociativeTask(vocab_size=17, noise_tokens=3)) == 1 / 7
