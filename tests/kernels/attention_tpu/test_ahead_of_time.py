"""The real TPU compiler, where tools/aot has installed it; and the results that are kept."""

import json
import subprocess
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[3]
KEPT = ROOT / "tools" / "ahead_of_time" / "results" / "tpu.json"


def run(tmp_path, *options: str) -> dict:
    pins = ROOT / ".venv-aot" / "pins.txt"
    wanted = ROOT / "requirements" / "aot-tpu.txt"
    if not pins.exists() or pins.read_bytes() != wanted.read_bytes():
        pytest.skip("no .venv-aot with the pinned libtpu: tools/aot tpu makes it")
    out = tmp_path / "tpu.json"
    command = [str(ROOT / "tools" / "aot"), "tpu", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.full
def test_16m_tokens_over_a_slice_compile(tmp_path):
    report = run(tmp_path, "--quick", "--only", "16M")
    both = next(row for row in report["compiled"] if row["what"] == "forward and backward")
    assert both["tokens"] == 2**24
    assert set(both["scalar_bytes"]) == {"attention_forward", "attention_dq", "attention_dkv"}
    assert max(both["scalar_bytes"].values()) <= 16 * 1024 + 4


@pytest.mark.slow
def test_every_chip_and_every_length_compiles(tmp_path):
    report = run(tmp_path, "--quick")
    assert {row["device"] for row in report["compiled"]} == {"TPU v5 lite", "TPU v5", "TPU v6 lite"}
    assert {2**20, 2**22, 2**24} <= {row["tokens"] for row in report["compiled"]}
    assert not report["wrong"]


def test_the_kept_results_are_whole():
    report = json.loads(KEPT.read_text(encoding="utf-8"))
    assert not report["quick"]
    assert not report["wrong"]
    # The compiler does refuse scalars that do not fit: its taking the rest says something.
    assert "smem" in report["control_2_mib_of_scalars"]
    rows = report["compiled"]
    for device in ("TPU v5 lite", "TPU v5", "TPU v6 lite"):
        served = {(row["head_dim"][0], row["what"]) for row in rows if row["device"] == device}
        for what in ("forward", "forward and backward"):
            assert {(64, what), (128, what), (256, what)} <= served
    assert {2**20, 2**22, 2**24} <= {row["tokens"] for row in rows if row["chips"] > 1}
    assert max(size for row in rows for size in row["scalar_bytes"].values()) <= 16 * 1024 + 4
