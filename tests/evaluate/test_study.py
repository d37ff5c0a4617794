"""A study picks each arm's best candidate and repeats no run that is done."""

import dataclasses
import json

import pytest

from memtrain.data.config import DataConfig, MqarTask
from memtrain.evaluate import study
from tests.helpers import tiny


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
    arm = study.run_arm("x", rates, (0, 1), tmp_path, score="validation/loss", say=lines.append)

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
    assert arm.mean == pytest.approx(sum(values) / 2)
    assert arm.stdev == pytest.approx(abs(values[0] - values[1]) / 2**0.5)

    def again(*_, **__):
        raise AssertionError("a run that is done was trained again")

    monkeypatch.setattr(study, "train", again)
    assert study.run_arm("x", rates, (0, 1), tmp_path, score="validation/loss") == arm

    picture = tmp_path / "study.png"
    study.draw_study(picture, {"a": [(arm, 1)], "b": [(arm, 2)]}, x="step", y="loss")
    assert picture.read_bytes().startswith(b"\x89PNG")
