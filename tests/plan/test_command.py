"""`memtrain plan` from its command line: what it prints, and its exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest

from memtrain.cli import main
from memtrain.config import override
from memtrain.plan.memory import estimate_memory
from memtrain.plan.plot import COLOURS, short
from memtrain.recipe import load_recipe


RECIPES = Path(__file__).parent / "recipes.py"


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    code = main(["plan", *arguments, "--json"])
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    return code, json.loads(out), err


def test_without_a_target_it_counts_bytes_and_flops(capsys: pytest.CaptureFixture[str]):
    code, told, _ = planned(capsys, f"{RECIPES}:small")
    assert code == 0
    assert told["target"] is told["step"] is told["memory"]["fits"] is None
    by_kind = {row["kind"]: row["parameters"] for row in told["layers"]}
    assert told["num_parameters"] == sum(by_kind.values())
    assert by_kind["table"] == 64 * 16
    parts = told["memory"]["parts"]
    assert sum(part["at_peak"] for part in parts.values()) == told["memory"]["bytes_per_device"]
    assert parts["parameters"]["device"] == 4 * told["num_parameters"]
    assert {row["name"] for row in told["shardings"]} >= {"embedding", "tables.memory"}


def test_with_a_target_it_compiles_the_train_step(capsys: pytest.CaptureFixture[str]):
    code, told, err = planned(
        capsys, f"{RECIPES}:small", "--target", "cpux2", "--set", "mesh.fsdp=2"
    )
    assert code == 0
    assert "compiling the train step for cpux2" in err
    found = told["compiled"]
    # All that is set aside: what comes in, what is new of what goes out, and what is between.
    held = found["arguments"] + found["temporaries"] + found["outputs"] - found["aliased"]
    assert found["bytes_per_device"] == found["allocated"] == pytest.approx(held, abs=1024)
    lives = ("parameters", "optimizer", "batch")
    expected = sum(told["memory"]["parts"][part]["device"] for part in lives)
    assert found["arguments"] == pytest.approx(expected, abs=512)
    assert told["longest_seq_len"] > 64


def test_for_people_it_is_a_table(capsys: pytest.CaptureFixture[str]):
    arguments = ["--target", "v5e:4x4", "--no-compile", "--shardings"]
    arguments += ["--set", "mesh.fsdp=4", "mesh.context=4"]
    assert main(["plan", f"{RECIPES}:small", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for line in ("v5e:4x4: 16 x TPU v5e", "zigzag layout, ring", "bound by", "longest context"):
        assert line in out
    assert "blocks.0.mixer.layer.query.weight" in out
    assert "(-, fsdp+context, -)" in out


def test_on_a_large_v5e_slice_it_takes_another_strategy_and_says_so(
    capsys: pytest.CaptureFixture[str],
):
    arguments = ["--target", "v5e:4x8", "--no-compile"]
    arguments += ["--set", "mesh.context=32", "train.seq_len=65536"]
    assert main(["plan", f"{RECIPES}:small", *arguments]) == 0
    out, _ = capsys.readouterr()
    assert "zigzag layout, usp" in out
    assert "on 32 x TPU v5 lite a ring's permutes wait for the arithmetic" in out
    _, usp, _ = planned(capsys, f"{RECIPES}:small", *arguments)
    _, ring, _ = planned(capsys, f"{RECIPES}:small", *arguments, "mesh.context_strategy=ring")
    # Two key heads: groups of two, and half of the ring's 31 hops.
    assert usp["context"]["hops"]["model.pattern.1"] == 15
    assert ring["context"]["hops"]["model.pattern.1"] == 31
    traffic = [shown["step"]["links"]["keys and values over context"] for shown in (usp, ring)]
    assert traffic[0] < 0.65 * traffic[1]
    assert usp["step"]["exposed"] < ring["step"]["exposed"]


def test_what_does_not_fit_is_told_in_full_with_what_would(capsys: pytest.CaptureFixture[str]):
    arguments = ["--target", "v5e:2x4", "--no-compile", "--set", "mesh.data=8"]
    code, told, _ = planned(capsys, f"{RECIPES}:large", *arguments)
    assert code == told["exit_code"] == 2
    assert told["memory"]["fits"] is False
    assert told["layers"]
    assert "too little" in told["error"]
    change = told["change_that_fits"]
    assert change == "mesh.data=1 mesh.fsdp=8"
    # The change is held to its word: with it the plan fits, and with half of it, it does not.
    settings = [a.replace("mesh.data=8", "mesh.data=1") for a in arguments] + ["mesh.fsdp=8"]
    code, fitting, _ = planned(capsys, f"{RECIPES}:large", *settings)
    assert (code, fitting["memory"]["fits"]) == (0, True)
    halves = [*arguments[:-1], "mesh.data=2", "mesh.fsdp=4"]
    assert planned(capsys, f"{RECIPES}:large", *halves)[0] == 2
    assert main(["plan", f"{RECIPES}:large", *arguments]) == 2
    out = capsys.readouterr().out
    assert "memory of the train step" in out
    assert told["error"] in out


def test_the_longest_context_is_the_longest(capsys: pytest.CaptureFixture[str]):
    arguments = ["--target", "v5p:2x2x2", "--no-compile", "--set", "mesh.context=8"]
    code, told, _ = planned(capsys, f"{RECIPES}:large", *arguments, "train.batch_size=1")
    longest = told["longest_seq_len"]
    assert code == 0
    assert longest % (8 * 128) == 0
    for seq_len, fits in ((longest, True), (longest + 8 * 128, False)):
        more = ["train.batch_size=1", f"train.seq_len={seq_len}"]
        _, told, _ = planned(capsys, f"{RECIPES}:large", *arguments, *more)
        assert told["memory"]["fits"] is fits


def test_lengths_are_short_on_an_axis_and_every_part_has_a_colour_of_its_own():
    values = ["8192", "1048576", "3145728", "1000", "0", "full"]
    assert [short(value) for value in values] == ["8K", "1M", "3M", "1000", "0", "full"]
    assert len(set(COLOURS.values())) == len(COLOURS)
    platforms = ("cpu", "tpu")
    large = load_recipe(f"{RECIPES}:large")
    sharded = override(large, ["mesh.fsdp=2", "mesh.context=2", "train.accumulation_steps=2"])
    for experiment in (load_recipe(f"{RECIPES}:small"), sharded):
        for platform in platforms:
            moments = estimate_memory(experiment, 32_768, platform).moments.values()
            assert {part for moment in moments for part in moment} <= set(COLOURS)


def test_a_sweep_is_a_line_each_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    png, svg = tmp_path / "a.png", tmp_path / "a.svg"
    arguments = ["--target", "v5e:4x4", "--set", "mesh.context=16", "--sweep", "seq_len=64,128,256"]
    code, told, _ = planned(capsys, f"{RECIPES}:small", *arguments, "--plot", str(png))
    assert code == 0
    assert [row["train.seq_len"] for row in told["sweep"]] == ["64", "128", "256"]
    sizes = [row["bytes_per_device"] for row in told["sweep"]]
    assert sizes == sorted(sizes)
    assert all(sum(row["parts"].values()) == row["bytes_per_device"] for row in told["sweep"])
    assert png.read_bytes().startswith(b"\x89PNG")
    assert main(["plan", f"{RECIPES}:small", *arguments, "--plot", str(svg)]) == 0
    out = capsys.readouterr().out
    assert len([line for line in out.splitlines() if line.startswith("  ")]) == 4
    text = svg.read_text(encoding="utf-8")
    assert "<svg" in text


def test_a_sweep_over_meshes_counts_devices(capsys: pytest.CaptureFixture[str]):
    _, told, _ = planned(capsys, f"{RECIPES}:small", "--sweep", "mesh.context=1,2,4")
    assert [row["num_devices"] for row in told["sweep"]] == [1, 2, 4]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--target v5e:4x4 --no-compile", "takes 1 devices and --target v5e:4x4 has 16"),
        ("--set mesh.context=4 train.seq_len=66", "takes multiples of 8; nearest 64 or 72"),
        ("--set mesh.context=8 mesh.context_strategy=ulysses", "cannot divide 4 query"),
        ("--sweep seq_len", "--sweep 'seq_len': expected KEY=V1,V2,..., as in train.seq_len="),
        ("--sweep seq_lem=1,2", "unknown key 'seq_lem'"),
        ("--sweep mesh.context=1,3", "cannot be split over mesh.context=3"),
        ("--sweep seq_len=1,2 --plot {tmp}/a.gif", "give a file that ends in .png or .svg"),
        ("--sweep seq_len=1,2 --plot {tmp}/no/a.png", "there is no folder {tmp}/no"),
        ("--target cpux1 --compile --no-compile", "--compile: --no-compile contradicts it"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, said: str
):
    assert main(["plan", f"{RECIPES}:small", *arguments.format(tmp=tmp_path).split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said.format(tmp=tmp_path) in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_missing_compiler_names_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    import importlib.util

    real = importlib.util.find_spec
    hidden = ("libtpu", "jax_cuda13_plugin")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in hidden else real(name, *a)
    )
    for target, package, extra in (
        ("v5e:1x1", "libtpu", "memtrain[tpu]"),
        ("h200x1", "jax_cuda13_plugin", "memtrain[cuda]"),
    ):
        assert main(["plan", f"{RECIPES}:small", "--target", target]) == 2
        err = capsys.readouterr().err
        assert err.startswith(
            f"memtrain: error: --target {target}: the compiler is missing ({package}"
        )
        assert f"pip install '{extra}', or give --no-compile" in err
        assert err.count("\n") == 1


def test_long_rows_are_counted_from_short_ones():
    """Residuals are affine in the tokens: what is extrapolated is what a trace of it all counts."""
    import dataclasses

    from memtrain.plan import activations
    from memtrain.recipe import load_recipe

    base = load_recipe(f"{RECIPES}:small")
    longer = dataclasses.replace(base, train=dataclasses.replace(base.train, seq_len=20_000))
    extrapolated = estimate_memory(longer, 256, "cpu").total
    before = activations._LONGEST_TRACE
    try:
        activations._LONGEST_TRACE = 10_000
        traced = estimate_memory(longer, 256, "cpu").total
    finally:
        activations._LONGEST_TRACE = before
    assert extrapolated == pytest.approx(traced, rel=1e-3)
