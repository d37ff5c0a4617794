"""Export finishes only if what is on the disk decodes as it was trained."""

import dataclasses
import os

import numpy as np
import pytest

import memtrain.memory.attention as attention_module
from memtrain.config import Experiment
from memtrain.data.tokenizer import load_tokenizer
from memtrain.decode.artifact import Artifact
from memtrain.decode.export import export_model
from memtrain.decode.golden import golden_prompts, longest_window
from memtrain.decode.parity import first_near_ties, mean_kl
from memtrain.errors import ArtifactError, BadInput
from memtrain.layers import Attention, Block, ModelConfig, ProductKeyMemory, Window

from .conftest import random_model


TINY = ModelConfig(
    dim=32,
    pattern=(
        Block(
            mixer=Window(4, num_heads=2),
            ffn=ProductKeyMemory(num_slots=64, num_heads=1, top_k=3, key_dim=8, value_dim=16),
        ),
    ),
)
BYTES = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def tiny():
    return random_model(TINY, 256)


def run(model, out, **more):
    experiment = Experiment(name="tiny", model=model.config)
    return export_model(model, experiment, BYTES, out, {"run": "t", "step": 1}, **more)


@pytest.mark.full
def test_bfloat16_is_checked_against_float32_training(tiny, tmp_path):
    out = tmp_path / "model.mtx"
    result = run(tiny, out, dtype="bfloat16", programs=False)
    assert result["dtypes"]["params"] == "bfloat16"
    stored = result["checked"]["as_stored"]
    # Rounding shows, and is small: a KL of exactly 0 would mean that nothing was rounded.
    assert all(0 < cut["mean_kl"] <= 1e-3 for cut in stored.values())
    assert result["checked"]["float32"]["chunked"]["max_difference"] <= 1e-4
    artifact = Artifact.load(out)
    assert {t.dtype.name for t in artifact.tensors().values()} == {"bfloat16"}
    assert artifact.experiment.model.dtypes.params == "bfloat16"
    # The golden logits stay those of the float32 model.
    assert artifact.golden().logits.dtype == np.float32


def test_a_decoder_that_forgets_is_refused(tiny, tmp_path, monkeypatch):
    """The ring's newest token is lost between two calls: training does not notice, export does."""
    right = attention_module.Attention._write_ring

    def wrong(self, state, k, v, documents, current, ctx):
        last = ctx.valid & (np.arange(k.shape[1]) == k.shape[1] - 1)
        ctx = dataclasses.replace(ctx, valid=ctx.valid & ~last)
        return right(self, state, k, v, documents, current, ctx)

    monkeypatch.setattr(attention_module.Attention, "_write_ring", wrong)
    with pytest.raises(
        ArtifactError, match="decoding chunked does not reproduce training"
    ) as error:
        run(tiny, tmp_path / "model.mtx", programs=False)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


def test_bad_requests(tiny, tmp_path):
    with pytest.raises(BadInput, match="float32 or bfloat16"):
        run(tiny, tmp_path / "m.mtx", dtype="int3")
    small = random_model(TINY, 100)
    with pytest.raises(BadInput, match="the tokenizer has 256 ids, the model only 100"):
        run(small, tmp_path / "m.mtx")
    (tmp_path / "taken").write_text("")
    with pytest.raises(BadInput, match="is no artifact"):
        run(tiny, tmp_path / "taken")


def test_golden_prompts_go_past_twice_the_longest_window():
    config = ModelConfig(dim=32, pattern=(Window(100, sink_tokens=4), Window(30), Attention()))
    assert longest_window(config) == 104
    tokens, starts = golden_prompts(config, 256, BYTES)
    assert tokens.shape[1] > 208 and starts[:, 0].all() and starts.sum() == 3
    begin = np.flatnonzero(starts[1])[1]
    assert begin > 104  # the ring is full of the first document when the second begins
    numbers, _ = golden_prompts(config, 50, None)
    assert numbers.max() < 50


def test_mean_kl_of_a_known_pair():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    reference, logits = np.log(p)[None, None], np.log(q)[None, None] + 3.0
    expected = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    assert mean_kl(reference, logits) == pytest.approx(expected)


def test_near_ties_are_told_from_wrong_reads():
    slots = np.array([[[1, 2, 3]] * 5] * 2)
    weights = np.array([[[0.5, 0.3, 0.2]] * 5] * 2)
    other, same = slots.copy(), weights.copy()
    other[0, 3] = [2, 1, 3]  # another order of the same slots is no difference
    other[0, 4] = [1, 2, 9]  # the third slot's weight is met by another slot's
    same[0, 4] = [0.5, 0.3, 0.20001]
    other[1, 1] = [1, 2, 9]  # read with half the weight: that is wrong
    same[1, 1] = [0.5, 0.3, 0.1]
    expected = {"0.ffn": {"slots": slots, "weights": weights}}
    found = {"0.ffn": {"slots": other, "weights": same}}
    assert first_near_ties(expected, found, (2, 5)).tolist() == [4, 5]
