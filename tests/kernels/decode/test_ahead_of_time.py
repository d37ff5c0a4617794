"""The real TPU compiler takes the kernel, for every chip, in all that its table claims."""

import json
import os
import subprocess
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".venv-aot" / "bin" / "python"


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-aot: `tools/aot tpu` makes it")
def test_it_compiles_and_copies_no_pool():
    folder = Path(__file__).parent
    run = subprocess.run(
        [PYTHON, folder / "compile_for_tpu.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT / "kernels")},
        capture_output=True,
        text=True,
        timeout=900,
    )
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert {x["chip"] for x in found} == {"v5e", "v5p", "v6e"} and len(found) >= 75, run.stderr
    failed = [x for x in found if "error" in x]
    assert not failed, failed
    # Results of the splits, padded to tiles, and nothing of the size of the pool.
    assert not [x for x in found if x["pool_copies"]]
    assert not [x for x in found if x["temporary_bytes"] > x["pool_bytes"] / 2]
