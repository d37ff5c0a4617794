"""The table of facts: rows against its definition, and every fact once an epoch."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtrain.data.config import DataConfig, FactsTask, MqarTask, RecallTask
from memtrain.data.pipeline import GeneratedPipeline, build_pipeline
from memtrain.data.tasks.facts import FactTable
from memtrain.errors import BadInput


def pipeline(task: FactsTask, *, seq_len: int, batch_size: int = 3, seed: int = 0, data_seed=0):
    config = DataConfig(facts=task, prefetch=0, seed=data_seed)
    made = build_pipeline(config, seq_len=seq_len, batch_size=batch_size, seed=seed)
    assert isinstance(made, GeneratedPipeline)
    return made


def facts_in(task: FactsTask, batch) -> list[tuple[tuple[int, ...], int]]:
    """(name and relation, value) of every fact in a batch, read token by token."""
    found = []
    for row in zip(*batch, strict=True):
        told: list[int] = []
        for token, target, weight, position, start, valid in zip(*row, strict=True):
            if not valid:
                assert (token, weight, position, start) == (0, 0, 0, False)
                continue
            told = [] if start else told
            assert start == (len(told) == 0) and position == len(told)
            told.append(int(token))
            assert weight == (len(told) == task.name_len + 1)
            if weight:
                found.append((tuple(told), int(target)))
    return found


@given(
    num_facts=st.integers(1, 40),
    num_relations=st.integers(1, 5),
    num_values=st.integers(2, 9),
    name_len=st.integers(2, 3),
    spare=st.integers(0, 9),
    data_seed=st.integers(0, 99),
)
def test_an_epoch_tells_every_fact_once(
    num_facts, num_relations, num_values, name_len, spare, data_seed
):
    task = FactsTask(
        num_facts=num_facts,
        num_relations=num_relations,
        num_values=num_values,
        name_len=name_len,
        name_tokens=7,
    )
    made = pipeline(task, seq_len=task.fact_len + spare, data_seed=data_seed, batch_size=1)
    assert made.vocab_size == 7 + num_relations + num_values
    batches = made.batches(0)
    epochs = [
        [fact for _ in range(made.rows_per_epoch) for fact in facts_in(task, next(batches))]
        for _ in range(2)
    ]
    table = dict(epochs[0])
    assert len(table) == len(epochs[0]) == num_facts
    assert sorted(epochs[0]) == sorted(epochs[1])
    names = {told[:-1] for told in table}
    assert len(names) == -(-num_facts // num_relations)
    for told, value in table.items():
        assert all(0 <= token < 7 for token in told[:-1])
        assert 0 <= told[-1] - 7 < num_relations
        assert 0 <= value - 7 - num_relations < num_values
    # Held out is the same table: what is measured is what was taught.
    asked = made.questions(0, 1000)
    assert facts_in(task, asked.batch) == [
        fact for b in made.validation_batches(1000) for fact in facts_in(task, b)
    ]
    assert sorted(facts_in(task, asked.batch)) == sorted(table.items())
    assert not asked.distances.any()


def test_the_table_belongs_to_the_data_seed_and_the_order_to_both():
    task = FactsTask(num_facts=60)
    table = pipeline(task, seq_len=4).generated.table  # type: ignore[attr-defined]
    same = pipeline(task, seq_len=4, seed=1).generated.table  # type: ignore[attr-defined]
    other = pipeline(task, seq_len=4, data_seed=1).generated.table  # type: ignore[attr-defined]
    facts = np.arange(60)
    assert np.array_equal(table.told(facts), same.told(facts))
    assert np.array_equal(table.values(facts), same.values(facts))
    assert not np.array_equal(table.told(facts), other.told(facts))
    first = [next(pipeline(task, seq_len=4, seed=s).batches(0)).tokens.tobytes() for s in (0, 1)]
    assert first[0] != first[1]


def test_a_run_goes_on_from_any_sample():
    task = FactsTask(num_facts=50)
    whole = pipeline(task, seq_len=8, batch_size=4).batches(0)
    rows = [row for _ in range(20) for row in next(whole).tokens]
    resumed = next(pipeline(task, seq_len=8, batch_size=4).batches(41)).tokens
    np.testing.assert_array_equal(resumed, rows[41:45])


def test_a_million_facts_are_a_million_names_and_even_values():
    task = FactsTask(num_facts=1_000_000, num_relations=4, name_len=3, name_tokens=64)
    table = FactTable(task, key=1)
    facts = np.arange(1_000_000)
    told = table.told(facts)
    number = told @ np.array([1, 64, 64**2, 64**3])
    assert len(np.unique(number)) == 1_000_000
    counts = np.bincount(table.values(facts) - 68, minlength=256)
    assert len(counts) == 256
    statistic = ((counts - 1e6 / 256) ** 2 / (1e6 / 256)).sum()
    assert statistic < 256 + 5 * np.sqrt(2 * 256)


BAD: dict[str, tuple[dict[str, int], int]] = {
    "data.facts.num_facts=0: it takes 1": ({"num_facts": 0}, 8),
    "data.facts.num_values=1: it takes 2": ({"num_values": 1}, 8),
    "there are 4096 names of name_len=2; take name_len=3 or more relations": (
        {"num_facts": 20_000, "name_len": 2},
        8,
    ),
    "data.facts.name_len=6: 64 ** 6 names are more than 2 ** 32; 2 is enough": (
        {"name_len": 6},
        8,
    ),
    "train.seq_len=3: a fact of data.facts has 4 tokens": ({}, 3),
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_is_refused_with_what_could(message: str):
    fields, seq_len = BAD[message]
    with pytest.raises(BadInput) as raised:
        pipeline(FactsTask(**fields), seq_len=seq_len)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_it_stands_instead_of_text_and_of_other_tasks():
    refused: list[tuple[dict[str, Any], str]] = [
        ({"mqar": MqarTask()}, "data.mqar and data.facts: rows can hold one of them only"),
        ({"recall": RecallTask()}, "data.facts goes neither with data.recall"),
        ({"order": "document"}, "data.facts goes neither"),
    ]
    for more, message in refused:
        config = DataConfig(facts=FactsTask(), **more)
        with pytest.raises(BadInput, match=message):
            build_pipeline(config, seq_len=64, batch_size=2)
    made = pipeline(FactsTask(), seq_len=8)
    with pytest.raises(BadInput, match=r"data\.facts reads no text"):
        made.validation_documents()


def test_a_table_goes_on_where_another_run_ended():
    """Facts 5 to 11 are those that a run of the first 12 ends with."""
    task = FactsTask(num_facts=12, num_relations=3, name_len=3, name_tokens=7)
    later = dataclasses.replace(task, first_fact=5, num_facts=7)
    whole, part = (pipeline(t, seq_len=t.fact_len, batch_size=1) for t in (task, later))
    of = lambda made, count: [  # noqa: E731
        facts_in(task, made.questions(i, i + 1)[0])[0] for i in range(count)
    ]
    assert of(part, 7) == of(whole, 12)[5:]
    assert part.vocab_size == whole.vocab_size and part.num_validation_rows == 7
    told = [facts_in(task, batch)[0] for batch in itertools.islice(part.batches(0), 7)]
    assert sorted(told) == sorted(of(whole, 12)[5:])


def test_a_table_that_could_not_go_on_is_refused():
    task = FactsTask(num_facts=12, num_relations=1, name_len=2, name_tokens=7)
    with pytest.raises(BadInput, match=r"first_fact=4: 16 entities are a quarter of the 49 names"):
        pipeline(dataclasses.replace(task, first_fact=4), seq_len=3)
    with pytest.raises(BadInput, match=r"data\.facts\.first_fact=-1: it takes 0 or more"):
        pipeline(dataclasses.replace(task, first_fact=-1), seq_len=3)
