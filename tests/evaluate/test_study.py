"""A study picks each arm's best candidate and repeats no run that is done."""

import dataclasses
import json

import pytest

from memtrain.data.config import DataConfig, MqarTask
from memtrain.evaluate import study
from memtrain.evaluate.study_command import Study, draw_curves, table_row
from tests.helpers import tiny


WORST = study.Score("validation/loss", best="most")
TASK = MqarTask(vocab_size=32, num_pairs=2, num_train=64, num_validation=16)


def candidate(rate):
    base = tiny.experiment(windows_only=True, num_steps=4, evaluate_every_steps=2)
    return dataclasses.replace(
        base,
        data=DataConfig(mqar=TASK, prefetch=0),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=rate),
    )


@pytest.mark.full
def test_the_best_candidate_is_trained_with_every_seed(tmp_path, monkeypatch):
    lines = []
    rates = {"none": candidate(0.0), "some": candidate(3e-2)}
    # By the loss, of which the candidate that does not learn keeps the most: the order is known.
    arm = study.run_arm("x", rates, (0, 1), tmp_path, score=WORST, say=lines.append)

    def written(label, seed):
        path = tmp_path / "x" / label / f"seed-{seed}" / "metrics.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()]
        return {x["step"]: x["validation/loss"] for x in found if "validation/loss" in x}

    ends = {label: written(label, 0)[4] for label in rates}
    assert arm.candidates == ends and ends["none"] > ends["some"]
    assert arm.chosen == "none" and sorted(arm.curves) == [0, 1]
    assert arm.curves[1].steps == list(written("none", 1))
    assert arm.curves[1].last == written("none", 1)[4]
    assert not (tmp_path / "x" / "some" / "seed-1").exists()
    values = [curve.last for curve in arm.curves.values()]
    assert arm.spread[0] == pytest.approx(sum(values) / 2)
    assert arm.spread[1] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)

    def again(*_, **__):
        raise AssertionError("a run that is done was trained again")

    monkeypatch.setattr(study, "train", again)
    assert study.run_arm("x", rates, (0, 1), tmp_path, score=WORST) == arm

    picture, kept = tmp_path / "page" / "study.png", tmp_path / "page" / "study.json"
    arguments = ["--seeds", "0", "1", "--runs", str(tmp_path)]
    arguments += ["--out", str(kept), "--plot", str(picture)]
    page = Study("page", arms=["x", "y"], seeds=[5], arguments=arguments)
    assert page.arms == ["x", "y"] and page.arm("x", rates, score=WORST) == arm
    panels = {"a": [(arm, 1.0)], "b": [(arm, 2.0)]}
    page.keep([arm.as_dict()], lambda figure: draw_curves(figure, panels, x="step", y="loss"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(kept.read_text())["results"][0]["mean"] == arm.spread[0]


def test_rows_of_a_page():
    row = table_row("bank", (0.4821, 0.0061), 4_096, {"0.1": 2.5, "0.2": 2.25}, digits=2)
    assert row == "| bank | 0.48 ± 0.01 | 4,096 | 2.50 / 2.25 |"


def test_a_score_that_is_no_number_is_worth_least():
    for score in (study.LOSS, study.ACCURACY):
        assert score.worth(float("nan")) < score.worth(1e9) and score.worth(0.5) != score.worth(1)
    assert study.LOSS.worth(1.0) > study.LOSS.worth(2.0)
