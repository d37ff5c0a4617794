"""The exported program, run by jax and safetensors alone."""

import json
import re
import subprocess
import sys


BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("memtrain", "memtrain_kernels", "flax", "orbax"):
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
try:
    import memtrain
except ModuleNotFoundError:
    import runpy
    script = sys.argv[1]
    sys.argv = sys.argv[1:]
    runpy.run_path(script, run_name="__main__")
"""


def test_golden_logits_without_memtrain(artifact_path):
    script = artifact_path / "program" / "decode.py"
    command = [sys.executable, "-B", "-W", "error", "-c", BLOCKED, str(script), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = re.search(r"largest difference (\S+), mean KL (\S+) nats", done.stdout)
    assert found, done.stdout
    assert float(found[1]) <= 1e-4
    about = json.loads((artifact_path / "program" / "program.json").read_text())
    assert about["platforms"] == ["cpu", "cuda", "tpu"]
