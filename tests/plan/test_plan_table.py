"""The kept table of `tools/aot plan-table`: what it claims follows from what the compilers said."""

import copy
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from memtrain.config import override
from memtrain.plan.devices import DEVICES
from memtrain.plan.memory import estimate_memory
from memtrain.plan.target import parse_target
from memtrain.recipe import load_recipe


ROOT = Path(__file__).parents[2]


def _tool():
    path = ROOT / "tools" / "ahead_of_time" / "plan_table.py"
    spec = importlib.util.spec_from_file_location("plan_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plan_table"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


TABLE = _tool()
KEPT = json.loads(TABLE.RESULTS.read_text(encoding="utf-8"))
ROWS = {row["name"]: row for row in KEPT["rows"]}
KEYS = 2 * 4 * 4096 * 128
"""Half-keys of one memory layer: two halves, four heads, the root of the slots."""
COMPILED = [row for row in KEPT["rows"] if "compiled" in row]


def test_every_row_is_kept_and_the_page_shows_them():
    assert list(ROWS) == [row.name for row in TABLE.ROWS]
    assert TABLE.PAGE.read_text(encoding="utf-8") == TABLE.as_page(KEPT["rows"])


@pytest.mark.parametrize("row", COMPILED, ids=lambda row: row["name"])
def test_what_fits_fits_by_the_compilers_own_figures(row):
    compiled = row["compiled"]
    needed = compiled["bytes_per_device"]
    most = compiled["arguments"] + compiled["temporaries"]
    most += compiled["outputs"] - compiled["aliased"]
    assert needed == (compiled.get("allocated") or most)
    # What is set aside lies in places that are lined up, and has the program's constants.
    assert compiled["peak"] <= needed <= most + 2**20
    kind = parse_target(row["target"]).device.kind
    assert row["fits"] == (needed <= DEVICES[kind].memory_bytes)
    # Whatever is updated takes the place of what it was.
    assert compiled["outputs"] - compiled["aliased"] < 2**20
    # Parameters and two moments in float32 lie over the devices once. Half-keys, and the row's
    # eighteen bytes a token, are on every device; TPUs pad rows that are split 2,048 times.
    state = 12 * row["num_parameters"] / row["num_devices"]
    whole = 12 * 4 * KEYS + 18 * row["batch_size"] * row["seq_len"]
    assert state <= compiled["arguments"] < state + whole + 2**27


@pytest.mark.parametrize("row", KEPT["rows"], ids=lambda row: row["name"])
def test_the_recipe_is_still_what_was_compiled(row):
    experiment = load_recipe(f"{ROOT / 'experiments' / 'flagship.py'}:{row['function']}")
    settings = dict(setting.split("=") for setting in row["settings"])
    if row["lengths"] is None:
        assert row["seq_len"] == int(settings.get("train.seq_len", experiment.train.seq_len))
    else:
        first, last, step = row["lengths"]
        assert row["seq_len"] in range(first, last + 1, step)
    assert row["mesh"] == experiment.mesh.sizes
    assert row["num_devices"] == parse_target(row["target"]).num_devices


def test_the_flagship_is_no_toy():
    """32 layers, 28 of them with feed-forward layers, 4 with the memory; by hand."""
    attention = 4096 * 128 * (32 + 8 + 8) + 32 * 128 * 4096 + 2 * 128
    feed_forward = 3 * 4096 * 14_336
    memory = 4096 * 4 * 256 + KEYS + 4 + 2 * 4096 * 1024
    norms = 65 * 4096
    vocabulary = 2 * 128_256 * 4096
    table = 4096**2 * 1024
    expected = 32 * attention + 28 * feed_forward + 4 * memory + norms + vocabulary + table
    assert {row["num_parameters"] for row in COMPILED} == {expected}


@pytest.mark.parametrize(
    ("name", "seq_len", "target"),
    [
        ("one-million", 2**20, "v5p:4x4x4"),
        ("four-million", 2**22, "v5p:8x8x8"),
        ("sixteen-million", 2**24, "v5p:8x16x16"),
    ],
)
def test_slices_fit_with_every_permute_beside_a_kernel(name: str, seq_len: int, target: str):
    row = ROWS[name]
    assert (row["seq_len"], row["target"], row["fits"]) == (seq_len, target, True)
    for way in ("forward", "backward"):
        seen = row["compiled"]["permutes"][way]
        assert seen["synchronous"] == 0
        assert seen["overlapping"] == seen["asynchronous"] > 0


def test_eight_gpus_hold_a_million_tokens_and_the_longest_row_is_known():
    assert (ROWS["hopper-1024k"]["seq_len"], ROWS["hopper-1024k"]["fits"]) == (2**20, True)
    row = ROWS["hopper-longest"]
    tried = {one["seq_len"]: one["fits"] for one in row["tried"]}
    step = row["lengths"][2]
    assert row["fits"] and tried[row["seq_len"]]
    assert tried[row["seq_len"] + step] is False
    assert all(fits == (length <= row["seq_len"]) for length, fits in tried.items())


@pytest.mark.parametrize("row", COMPILED, ids=lambda row: row["name"])
def test_the_estimate_is_within_15_percent_of_the_compiler(row):
    experiment = load_recipe(f"{ROOT / 'experiments' / 'flagship.py'}:{row['function']}")
    experiment = override(experiment, [f"train.seq_len={row['seq_len']}"])
    platform = parse_target(row["target"]).device.platform
    estimate = estimate_memory(experiment, vocab_size=128_256, platform=platform)
    compiled = row["compiled"]
    # Of a row that was compiled before the total was kept, two figures hold it from both sides.
    least = compiled.get("allocated") or compiled["peak"]
    assert 0.85 * least <= estimate.total <= 1.15 * compiled["bytes_per_device"]
    # The page shows the estimate of now: `--estimates` makes it anew without compiling.
    assert row["estimate"]["bytes_per_device"] == pytest.approx(estimate.total, rel=0.01)


@pytest.mark.parametrize("longest", [0, 1, 5, 6, 7])
def test_the_longest_row_that_fits_is_found_by_bisection(longest: int, monkeypatch):
    """Seven lengths, of which those up to the `longest`-th fit: three compilations tell."""
    asked = []

    def compiled(row, seq_len, minutes):
        asked.append(seq_len)
        return {"seq_len": seq_len, "fits": seq_len <= 100 * longest, "compiled": _BYTES}

    monkeypatch.setattr(TABLE, "_compiled_apart", compiled)
    row = dataclasses.replace(TABLE.ROWS[-1], lengths=(100, 700, 100))
    found = TABLE.run_row(row, minutes=1)
    assert found.get("seq_len") == (100 * longest or None)
    assert ("refused" in found) == (longest == 0)
    assert [one["seq_len"] for one in found["tried"]] == asked
    assert len(asked) <= 3


_BYTES = {"bytes_per_device": 1}


def test_nothing_is_wrong_with_what_is_asserted():
    assert TABLE.judge(KEPT["rows"]) == KEPT["wrong"] == []


def test_the_judge_sees_what_is_wrong():
    good = copy.deepcopy(ROWS["one-million"])
    assert TABLE.judge([good]) == []
    synchronous = copy.deepcopy(good)
    synchronous["compiled"]["permutes"]["backward"]["overlapping"] -= 1
    large = good | {"fits": False, "device_bytes": 2**30}
    refused = {k: v for k, v in good.items() if k != "compiled"} | {"refused": "too large"}
    wrong = TABLE.judge([synchronous, large, refused])
    assert len(wrong) == 3
    assert all(line.startswith("one-million") for line in wrong)
