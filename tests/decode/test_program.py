"""The exported program, run by jax and safetensors alone."""

import json
import re
import subprocess
import sys

import pytest

import memtrain_kernels
from memtrain.config import Experiment
from memtrain.data.tokenizer import load_tokenizer
from memtrain.decode.export import export_model
from memtrain.decode.program import export_programs
from memtrain.layers import Attention, Block, ModelConfig, ShortConv

from .conftest import random_model


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
    checked = json.loads((artifact_path / "manifest.json").read_text())["checked"]["program"]
    assert checked["max_difference"] == pytest.approx(float(found[1]), rel=0.01)
    about = json.loads((artifact_path / "program" / "program.json").read_text())
    assert about["platforms"] == ["cpu", "cuda", "tpu"]


def test_a_prompt_too_long_for_the_program_is_one_line(artifact_path):
    script = artifact_path / "program" / "decode.py"
    command = [sys.executable, "-B", str(script), "x" * 5000]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    *_, last = done.stderr.splitlines()
    assert "a prompt of 5000 tokens and 100 more do not fit" in last
    assert "Traceback" not in done.stderr and done.stdout == ""


@pytest.mark.full
def test_state_within_state_goes_through_the_program(tmp_path):
    """A convolution of its own and one on the keys: nested leaves, by name. And gated places."""
    mixer = Attention(num_heads=2, rope_theta=None, key_conv=3)
    pattern = (Block(mixer=ShortConv(3)), Block(mixer=mixer, residual_gate=True))
    config = ModelConfig(dim=16, pattern=pattern, repeats=2)
    experiment = Experiment(name="random", model=config)
    model = random_model(config, 256)
    made = export_model(model, experiment, load_tokenizer("bytes"), tmp_path / "m.mtx", {})
    assert made["checked"]["program"]["max_difference"] <= 1e-4
    spec = json.loads((tmp_path / "m.mtx" / "cache_spec.json").read_text())
    leaves = [name for place in spec["places"] for name in place["leaves"]]
    assert {"input", "key_conv.input", "key_conv.document"} <= set(leaves)


@pytest.mark.parametrize("backend", ["tpu", "cudnn"])
def test_a_program_asks_no_device_what_it_prefers(backend, monkeypatch):
    """A model that was trained on another device's kernels, and a variable that asks for them."""
    layer = Attention(num_heads=1, head_dim=64, backend=backend)
    config = ModelConfig(dim=64, pattern=(Block(mixer=layer),))
    monkeypatch.setenv("MEMTRAIN_ATTENTION_BACKEND", backend)
    files = export_programs(config, 16, capacity=32, chunk=8)
    assert {"prefill.jaxexport", "step.jaxexport"} <= set(files)
    assert memtrain_kernels.last_backend() == "xla"
