"""What a run tells while it goes: TensorBoard's files, and the end of a run that has diverged."""

import importlib
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memtrain.config import override
from memtrain.errors import BadInput
from memtrain.recipe import load_recipe
from memtrain.train.metrics import MetricsWriter
from memtrain.train.run import train


RECIPE = Path(__file__).parents[1] / "helpers" / "tiny_recipe.py"


def experiment(*changes: str):
    return override(load_recipe(str(RECIPE)), list(changes))


def quiet(line: str) -> None:
    pass


def json_lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def records(file: Path) -> Iterator[bytes]:
    """TFRecord framing: a length, its checksum, as many bytes, their checksum."""
    content = file.read_bytes()
    at = 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        yield content[at + 12 : at + 12 + length]
        at += 12 + length + 4
    assert at == len(content)


def shown(run: Path) -> dict[tuple[str, int], float]:
    """(name, step) -> value, as TensorBoard shows a folder: files in order of their names, and the
    start of a session takes back what was told of its steps and later ones before."""
    # Generated code, in which a type checker finds no names.
    proto: Any = importlib.import_module("tensorboardX.proto.event_pb2")
    found: dict[tuple[str, int], float] = {}
    for file in sorted((run / "tensorboard").iterdir()):
        for record in records(file):
            event = proto.Event.FromString(record)
            if event.session_log.status == proto.SessionLog.START:
                found = {key: v for key, v in found.items() if key[1] < event.step}
            for value in event.summary.value:
                key = (value.tag, event.step)
                assert key not in found, f"{key} is told twice"
                found[key] = value.simple_value
    return found


def numbers(lines: list[dict]) -> dict[tuple[str, int], float]:
    """(name, step) -> value of metrics.jsonl, in the single precision that event files have."""
    return {
        (name, line["step"]): float(np.float32(value))
        for line in lines
        for name, value in line.items()
        if name != "step" and isinstance(value, int | float)
    }


@pytest.mark.full
def test_event_files_hold_what_metrics_jsonl_holds(tmp_path):
    config = experiment(
        "train.tensorboard=true",
        "train.num_steps=8",
        "train.log_every_steps=2",
        "train.evaluate_every_steps=4",
        "data.validation_fraction=0.3",
    )
    result = train(config, tmp_path, progress=quiet)
    lines = json_lines(tmp_path)
    found = shown(tmp_path)
    assert found == numbers(lines)
    losses = {step: value for (name, step), value in found.items() if name == "train/loss"}
    assert sorted(losses) == [2, 4, 6, 8]
    assert losses[8] == np.float32(result["train/loss"])
    # Bytes at random cost log 256 nats each, and a few steps do not change that much.
    assert all(abs(loss - math.log(256)) < 1 for loss in losses.values())
    assert {s for name, s in found if name == "validation/bits_per_byte"} == {4, 8}
    assert any(name.startswith("memory/") for name, _ in found)


def test_a_resumed_run_takes_back_what_it_tells_again(tmp_path, monkeypatch):
    """Steps after the checkpoint are told anew, in a file of their own: the last word counts."""
    # A file's name has the second in it in which it was begun.
    monkeypatch.setattr("time.time", iter(range(1_700_000_000, 1_800_000_000)).__next__)
    for resume_step, steps, sign in ((0, (1, 2, 3, 4), 1.0), (2, (3, 4, 5), -1.0)):
        writer = MetricsWriter(tmp_path, resume_step=resume_step, tensorboard=True)
        for step in steps:
            writer.write(step, {"train/loss": sign * step, "tokens": 7 * step})
        writer.close()
    expected = {1: 1.0, 2: 2.0, 3: -3.0, 4: -4.0, 5: -5.0}
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    found = shown(tmp_path)
    assert {s: v for (name, s), v in found.items() if name == "train/loss"} == expected
    assert {s: v for (name, s), v in found.items() if name == "tokens"} == {
        s: 7.0 * s for s in expected
    }
    assert {line["step"]: line["train/loss"] for line in json_lines(tmp_path)} == expected


def test_what_is_not_a_number_is_null_and_no_event(tmp_path):
    writer = MetricsWriter(tmp_path, resume_step=0, tensorboard=True)
    writer.write(3, {"a": math.nan, "b": math.inf, "c": [1.0, math.nan], "d": 2})
    writer.close()
    assert json_lines(tmp_path) == [{"step": 3, "a": None, "b": None, "c": [1.0, None], "d": 2}]
    assert shown(tmp_path) == {("d", 3): 2.0}


@pytest.mark.full
def test_a_run_that_has_diverged_ends_and_says_so(tmp_path):
    """A learning rate of 1e30: the first update leaves no number that a loss could come from."""
    changes = (
        "optimizer.learning_rate=1e30",
        "optimizer.warmup_steps=0",
        "optimizer.horizon_steps=20",
        "train.max_skipped_steps=4",
        "train.log_every_steps=1",
    )
    # Steps 2 to 5 are skipped: 4 in a row, which is allowed.
    train(experiment(*changes, "train.num_steps=5"), tmp_path, progress=quiet)
    told = [(s["step"], s["train/loss"], s["train/skipped_in_row"]) for s in json_lines(tmp_path)]
    assert told[0][1] == pytest.approx(math.log(256), abs=1)
    assert told[1:] == [(2, None, 1), (3, None, 2), (4, None, 3), (5, None, 4)]

    # The count goes on from the checkpoint: the next step is one too many.
    message = r"^step 6: loss or gradient not finite for 5 steps in a row .*max_skipped_steps"
    with pytest.raises(BadInput, match=message) as caught:
        train(experiment(*changes, "train.num_steps=20"), tmp_path, progress=quiet)
    assert "optimizer.learning_rate" in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    last = json_lines(tmp_path)[-1]
    assert last["step"] == 6 and last["train/skipped_steps"] == 5
    assert not (tmp_path / "tensorboard").exists()  # nobody asked for it
