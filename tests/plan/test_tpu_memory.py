"""The estimate for TPUs against what their compiler said of small train steps.

Nothing is compiled here: `tools/aot plan-shapes` did, and keeps what it was told.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from memtrain.plan.memory import estimate_memory


ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools" / "ahead_of_time"


def _tool(name: str):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up, and plan_shapes plan_table
    spec.loader.exec_module(module)
    return module


_tool("plan_table")
TOOL = _tool("plan_shapes")
ROWS = {row["name"]: row for row in json.loads(TOOL.RESULTS.read_text("utf-8"))["rows"]}


def test_every_shape_is_kept_as_it_is_asked_for():
    assert [(shape.name, shape.target) for shape in TOOL.SHAPES] == [
        (name, row["target"]) for name, row in ROWS.items()
    ]
    assert TOOL.read(TOOL.RESULTS) == list(ROWS.values())


@pytest.mark.parametrize("shape", TOOL.SHAPES, ids=lambda shape: shape.name)
def test_memory_is_within_15_percent(shape):
    compiled = ROWS[shape.name]["compiled"]
    estimate = estimate_memory(shape.build(), TOOL.VOCAB, "tpu")
    assert estimate.total == pytest.approx(compiled["bytes_per_device"], rel=0.15)
    # What lives from step to step, but for padding: counters, norms, the batch.
    lives = estimate.peak["parameters"] + estimate.peak["optimizer"] + estimate.peak["batch"]
    assert lives == pytest.approx(compiled["arguments"], rel=0.01)


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row["name"])
def test_the_compilers_figures_are_of_one_kind(row):
    compiled = row["compiled"]
    assert compiled["bytes_per_device"] == compiled["allocated"] >= compiled["peak"]
    new = compiled["outputs"] - compiled["aliased"]
    assert compiled["allocated"] <= compiled["arguments"] + compiled["temporaries"] + new
