"""The profiler's window: from its first step, from where a run begins inside it, up to its end."""

from pathlib import Path

import jax
import pytest

from memtrain.config import override
from memtrain.recipe import load_recipe
from memtrain.train.run import train


RECIPE = Path(__file__).parents[1] / "helpers" / "tiny_recipe.py"


@pytest.fixture
def traced(monkeypatch) -> list[str]:
    """What the profiler of JAX is asked, in order, with the steps in between."""
    asked: list[str] = []

    class Annotation:
        def __init__(self, name: str, step_num: int):
            asked.append(str(step_num))

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: asked.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: asked.append("stop"))
    monkeypatch.setattr(jax.profiler, "StepTraceAnnotation", Annotation)
    return asked


def run(folder: Path, steps: int, window: str) -> None:
    changes = [f"train.num_steps={steps}", "optimizer.horizon_steps=60"]
    experiment = override(
        load_recipe(str(RECIPE)), [*changes, f"train.profile_steps={window}"] if window else changes
    )
    train(experiment, folder, progress=lambda line: None)


@pytest.mark.full
def test_the_window_is_traced_and_no_more(traced, tmp_path):
    run(tmp_path, 6, "2,4")
    assert traced == ["start", "2", "3", "4", "stop"]


@pytest.mark.full
def test_a_run_that_resumes_inside_the_window_traces_the_rest(traced, tmp_path):
    run(tmp_path, 5, "")
    assert traced == []
    run(tmp_path, 9, "2,7")
    assert traced == ["start", "5", "6", "7", "stop"]


@pytest.mark.full
def test_a_run_that_ends_inside_the_window_ends_the_trace(traced, tmp_path):
    run(tmp_path, 4, "2,50")
    assert traced == ["start", "2", "3", "stop"]


def test_a_trace_is_written(tmp_path):
    run(tmp_path, 3, "1,2")
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
