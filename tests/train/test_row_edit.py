"""An edit writes the rows that it may, and those are the ones that the definition names."""

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memtrain.config import Experiment, override
from memtrain.data.config import DataConfig, FactsTask
from memtrain.data.pipeline import GeneratedPipeline
from memtrain.errors import BadInput
from memtrain.evaluate.subject import Subject
from memtrain.layers import Attention, Block, ModelConfig, ProductKeyMemory
from memtrain.model.parameters import parameters_of
from memtrain.parallel.mesh import mesh_of
from memtrain.train.config import OptimizerConfig, RowEdit, TrainConfig
from memtrain.train.init_from import Source, open_source
from memtrain.train.load import load_model
from memtrain.train.row_edit import RowCounts, background_of, best_rows, scores
from memtrain.train.run import train
from memtrain.train.state import Plan
from tests.helpers import tiny


NAME = "tables.memory"
TABLE = ProductKeyMemory(num_slots=64, num_heads=2, top_k=2, key_dim=8, value_dim=8)
OLD, NEW = 24, 6


def known(**fields: Any) -> Experiment:
    """Two layers that read one table, on facts of 4 tokens, 4 of them in a row."""
    settings = {"num_steps": 2, "batch_size": 2, "seq_len": 16, "evaluate_batches": 0}
    pattern = (Block(mixer=Attention(num_heads=2), ffn=TABLE), Block(ffn=TABLE))
    return Experiment(
        name="known",
        model=ModelConfig(dim=16, pattern=pattern),
        data=DataConfig(facts=FactsTask(num_facts=OLD, name_len=3, name_tokens=8), prefetch=0),
        train=TrainConfig(**(settings | fields)),
        optimizer=OptimizerConfig(learning_rate=1e-2, table_learning_rate=1e-1, warmup_steps=1),
    )


def edit(source: Path, *settings: str, rows: int = 5) -> Experiment:
    base = known(init_from=str(source), edit=RowEdit(rows=rows), num_steps=3)
    return override(
        base, [f"data.facts.first_fact={OLD}", f"data.facts.num_facts={NEW}", *settings]
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edit") / "known"
    train(known(), folder, progress=lambda line: None)
    return folder


def answers_read(source: Path, first: int, count: int) -> list[list[int]]:
    """The rows that the answer of each fact reads, as the decode path tells them, one by one."""
    settings = [f"data.facts.first_fact={first}", f"data.facts.num_facts={count}"]
    subject = Subject.open(source, settings)
    pipeline = subject.pipeline
    assert isinstance(pipeline, GeneratedPipeline)
    batch, _ = pipeline.questions(0, pipeline.num_validation_rows)
    engine = subject.engine(batch=1, chunk=4, capacity=4, want_reads=True)
    found = []
    for row, column in zip(*np.nonzero(batch.loss_weights), strict=True):
        engine.reset()
        _, reads = engine.trace(batch.tokens[row, column - 3 : column + 1][None])
        found.append([s for place in reads.values() for s in place["slots"][0, -1].tolist()])
    assert len(found) == count
    return found


def rows_by_definition(source: Path, rows: int) -> tuple[set[int], float]:
    """The best rows, and by how much the last one beats the next."""
    new, old = answers_read(source, OLD, NEW), answers_read(source, 0, OLD)
    total = sum(map(len, new))
    score = {
        slot: sum(fact.count(slot) for fact in new)
        / total
        * math.log((OLD + 1) / (sum(slot in fact for fact in old) + 1))
        for slot in range(TABLE.num_slots)
    }
    best = sorted(score, key=lambda slot: (-score[slot], slot))
    return {s for s in best[:rows] if score[s] > 0}, score[best[rows - 1]] - score[best[rows]]


def moved(source: Path, run: Path) -> dict[str, np.ndarray]:
    before, after = (parameters_of(load_model(path).model) for path in (source, run))
    return {name: np.asarray(before[name]) != np.asarray(after[name]) for name in before}


@pytest.mark.full
@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["optimizer.table_gradient=dense"],
        ["mesh.fsdp=2", "mesh.context=2", "mesh.tensor=2", "optimizer.table_gradient=rows"],
    ],
    ids=["rows", "whole gradient", "mesh"],
)
def test_an_edit_writes_the_chosen_rows_and_nothing_else(source, tmp_path, settings):
    said: list[str] = []
    # Whole epochs of both data, so that every fact counts alike.
    counts = ["train.edit.batches=1", "train.edit.background_batches=3", "train.batch_size=2"]
    config = override(edit(source), [*counts, *settings])
    train(config, tmp_path / "run", progress=said.append)
    wanted, margin = rows_by_definition(source, 5)
    assert len(wanted) == 5 and margin >= 0
    changed = moved(source, tmp_path / "run")
    rows = changed.pop(NAME).any(axis=1)
    assert not [name for name, where in changed.items() if where.any()]
    assert set(np.flatnonzero(rows)) == wanted
    assert any(line.startswith(f"{NAME}: 5 rows may be written, of 64") for line in said)


@pytest.mark.full
def test_an_edit_that_resumes_needs_no_source(source, tmp_path):
    """The rows were chosen when it began, and are part of its checkpoints."""
    copy = shutil.copytree(source, tmp_path / "copy")
    config = edit(copy, "train.checkpoint_every_steps=1")
    train(override(config, ["train.num_steps=1"]), tmp_path / "run", progress=lambda line: None)
    shutil.rmtree(copy)
    train(config, tmp_path / "run", progress=lambda line: None)
    train(edit(source), tmp_path / "whole", progress=lambda line: None)
    again, whole = (moved(source, tmp_path / name)[NAME] for name in ("run", "whole"))
    np.testing.assert_array_equal(again, whole)
    assert whole.any()


def test_the_score_is_tf_idf():
    new = RowCounts(np.array([6, 3, 3, 0]), np.array([2, 2, 1, 0]), 2)
    before = RowCounts(np.array([9, 1, 0, 0]), np.array([7, 1, 0, 0]), 7)
    found = scores(new, before)
    np.testing.assert_allclose(found, [0, 3 / 12 * math.log(8 / 2), 3 / 12 * math.log(8), 0])
    assert best_rows(found, 1).tolist() == [False, False, True, False]
    assert best_rows(found, 4).tolist() == [False, True, True, False]
    assert best_rows(np.array([1.0, 2.0, 1.0]), 2).tolist() == [True, True, False]


def test_what_an_edit_cannot_be_made_of(source, tmp_path):
    for settings, message in (
        (["train.freeze=tables.*"], "no memory table"),
        (["optimizer.table_update=dense"], "no memory table"),
        (["train.init_from=/nowhere"], "no such run"),
    ):
        with pytest.raises(BadInput, match=message):
            train(override(edit(source), settings), tmp_path / "run", progress=print)
        assert not (tmp_path / "run").exists()
    with pytest.raises(BadInput, match=r"train\.edit needs train\.init_from"):
        override(known(), ["train.edit.rows=5"])
    with pytest.raises(BadInput, match=r"train\.edit\.rows"):
        override(edit(source), ["train.edit.rows=0"])


def test_the_data_of_the_source_must_be_there(source, tmp_path):
    plan = tiny.plan_of(edit(source))
    gone = dataclasses.replace(known(), data=DataConfig(path=(str(tmp_path / "gone"),)))
    with pytest.raises(BadInput, match=r"train\.edit: the data that x was trained on: .*gone"):
        background_of(_source(gone), plan, print)


def _source(experiment: Experiment, missing: tuple[str, ...] = ()) -> Source:
    return Source("x", experiment, {}, {}, set(missing), dict)


def test_an_edit_trains_nothing_fresh(tmp_path):
    plan = tiny.plan_of(edit(tmp_path))
    with pytest.raises(BadInput, match=r"x has nothing that fits a, b; an edit trains no fresh"):
        background_of(_source(known(), ("b", "a")), plan, print)


@pytest.mark.full
def test_an_edit_of_an_edit_spares_what_both_know(source, tmp_path):
    """The third run's background is the second's facts and the first's."""
    train(edit(source), tmp_path / "second", progress=lambda line: None)
    third = override(
        edit(tmp_path / "second"), ["data.facts.first_fact=30", "data.facts.num_facts=4"]
    )
    assert third.data.facts is not None
    plan = Plan.of(third, third.data.facts.vocab_size, mesh_of(third.mesh))
    found = background_of(open_source(str(tmp_path / "second"), plan), plan, print)
    asked = [pipeline.fingerprint()["data.facts"] for pipeline in found]
    assert [(task["num_facts"], task.get("first_fact", 0)) for task in asked] == [(6, 24), (24, 0)]
    said: list[str] = []
    train(third, tmp_path / "third", progress=said.append)
    assert any("30 documents of the old" in line for line in said), said
