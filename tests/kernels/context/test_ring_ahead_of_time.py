"""Rings compiled by the real compilers: once more where they are installed, and what is kept."""

import json
import subprocess
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "tools" / "ahead_of_time" / "results"
PINS = {
    "ring": (".venv-aot", "aot-tpu.txt"),
    "ring-hopper": (".venv-aot-hopper", "cuda.txt"),
}
ASSERTED = {"v5e:4x4": 16, "v5p:4x4x4": 64, "v5p:8x8x8": 512, "v6e:8x8": 64, "v6e:16x16": 256}


def run(tmp_path, name: str, *options: str) -> dict:
    venv, wanted = PINS[name]
    pins = ROOT / venv / "pins.txt"
    if not pins.exists() or pins.read_bytes() != (ROOT / "requirements" / wanted).read_bytes():
        pytest.skip(f"no {venv} with the pinned compiler: tools/aot {name} makes it")
    out = tmp_path / "ring.json"
    command = [str(ROOT / "tools" / "aot"), name, "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text(encoding="utf-8"))


def kept(name: str) -> list[dict]:
    report = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    assert not report["quick"]
    assert not report["wrong"]
    assert not report["refused"]
    return report["compiled"]


def total(counts: dict) -> int:
    return counts["synchronous"] + counts["asynchronous"]


@pytest.mark.slow
def test_a_ring_over_64_chips_overlaps(tmp_path):
    report = run(tmp_path, "ring", "--quick")
    (row,) = report["compiled"]
    assert (row["chips"], row["hops"], row["tokens"]) == (64, 63, 2**20)
    # Forward: the loop's permute and the one before it. Backward: before the loop two of keys, in
    # it one of keys and one of gradients, behind it one of gradients and the way home.
    assert row["forward"] == {"synchronous": 0, "asynchronous": 2, "overlapping": 2}
    assert row["backward"] == {"synchronous": 0, "asynchronous": 6, "overlapping": 6}
    control = report["control_bare_permute"]
    assert (total(control), control["overlapping"], control["kernels"]) == (1, 0, 1)


@pytest.mark.slow
def test_a_ring_over_8_h200s_overlaps(tmp_path):
    (row,) = run(tmp_path, "ring-hopper", "--quick")["compiled"]
    assert row["hops"] == 7
    assert row["forward"] == {"synchronous": 0, "asynchronous": 7, "overlapping": 7}
    # Keys travel 7 hops, gradients 6 and home.
    assert row["backward"] == {"synchronous": 0, "asynchronous": 14, "overlapping": 14}


def test_the_kept_rings_overlap_on_every_slice():
    rows = [row for row in kept("ring-tpu.json") if row["strategy"] == "ring"]
    for topology, chips in ASSERTED.items():
        found = [row for row in rows if row["topology"] == topology]
        cases = {(row["kv_heads"], row["layout"], row["window"]) for row in found}
        assert {
            (2, "zigzag", None),
            (8, "zigzag", None),
            (2, "contiguous", 4096),
            (8, "contiguous", 4096),
        } <= cases
        for row in found:
            assert row["asserted"]
            assert row["chips"] == chips
            assert row["hops"] == (chips - 1 if row["window"] is None else 1)
            for what in ("forward", "backward"):
                assert row[what]["overlapping"] == total(row[what]) > 0, row["case"]
    # A hop is a permute of keys forward; backward one of keys and one of gradients.
    unrolled = next(r for r in rows if r["topology"] == "v5e:4x4" and r["window"] is None)
    assert (total(unrolled["forward"]), total(unrolled["backward"])) == (15, 30)


def test_the_kept_rings_need_as_much_memory_on_any_slice():
    rows = [row for row in kept("ring-tpu.json") if row["topology"].startswith("v5p")]
    looped = {
        row["tokens"]: row["temporaries_mib"]
        for row in rows
        if row["kv_heads"] == 2 and row["window"] is None
    }
    assert set(looped) == {2**20, 2**23, 2**24}
    assert max(looped.values()) <= 1.01 * min(looped.values())
    assert max(n for row in rows for n in row["scalar_bytes"].values()) <= 16 * 1024 + 4


def test_what_is_kept_of_v5e_beyond_16_chips():
    """Synchronous whatever was tried; other strategies compile there."""
    rows = [row for row in kept("ring-tpu.json") if row["device"] == "TPU v5 lite"]
    large = [row for row in rows if row["chips"] > 16]
    assert {row["strategy"] for row in large} == {"ring", "ulysses", "all_gather"}
    for row in large:
        assert not row["asserted"]
        if row["strategy"] == "ring":
            assert row["forward"]["asynchronous"] == row["backward"]["asynchronous"] == 0
            assert row["forward"]["synchronous"] > 0
        else:
            assert total(row["forward"]) == total(row["backward"]) == 0
            assert row["exchanges"]


def test_the_kept_rings_of_8_h200s_overlap():
    rows = kept("ring-hopper.json")
    assert {"zigzag", "contiguous"} == {row["layout"] for row in rows if row["asserted"]}
    for row in rows:
        if row["asserted"]:
            assert row["in_flight"] == 2
            for what in ("forward", "backward"):
                assert row[what]["overlapping"] == total(row[what]) > 0, row["case"]
    # By default one is in flight at a time, and half of the gradients' permutes run alone.
    (default,) = (row for row in rows if row["in_flight"] is None)
    assert default["forward"]["overlapping"] == total(default["forward"])
    assert 0 < default["backward"]["overlapping"] < total(default["backward"])
