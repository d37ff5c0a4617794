"""`memtrain import` and `memtrain export --huggingface`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from memtrain.cli import main
from memtrain.config import Experiment
from memtrain.data.tokenizer import load_tokenizer
from memtrain.decode.artifact import Artifact
from memtrain.interop.huggingface import load, save
from memtrain.layers import Attention, Block, ModelConfig, ProductKeyMemory, SwiGLU
from memtrain.model.parameters import Skeleton
from memtrain.train.load import LoadedModel


WORDS = ["the", "state", "of", "a", "memory", "is", "read", "?"]
CONFIG = ModelConfig(
    dim=8, pattern=(Block(mixer=Attention(num_heads=2), ffn=SwiGLU(hidden=12)),), repeats=2
)


def write_tokenizer(folder: Path) -> None:
    words = models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="?")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("models") / "tiny-qwen3"
    parameters = Skeleton.of(CONFIG, len(WORDS)).init(jax.random.key(0))
    save(folder, CONFIG, parameters)
    write_tokenizer(folder)
    return folder, parameters


@pytest.mark.full
def test_import_writes_an_artifact_that_generates(model, tmp_path, capsys):
    folder, _ = model
    out = tmp_path / "model.mtx"
    assert main(["import", str(folder), "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["created_from"] == {"huggingface": "tiny-qwen3"} and said["tokenizer"] == 8
    assert said["checked"]["float32"]
    prompt = ["--prompt", "the state of a", "--max-tokens", "4", "--temperature", "0", "--json"]
    assert main(["generate", str(out), *prompt]) == 0
    assert set(json.loads(capsys.readouterr().out)["text"].split()) <= set(WORDS)
    artifact = Artifact.load(out)
    assert artifact.experiment.model.pattern == load(folder)[0].pattern


def test_a_tokenizer_of_another_kind_is_refused(model, tmp_path, capsys):
    save(tmp_path / "other", CONFIG, model[1])
    (tmp_path / "other/tokenizer.model").write_bytes(b"")
    assert main(["import", str(tmp_path / "other"), "--out", str(tmp_path / "m.mtx")]) == 2
    assert "tokenizer.model: memtrain reads a tokenizer.json only" in capsys.readouterr().err
    assert not (tmp_path / "m.mtx").exists()


def run_of(config: ModelConfig, monkeypatch: pytest.MonkeyPatch, tokenizer: Path) -> Any:
    """Stands for a run: what its newest checkpoint holds."""
    skeleton = Skeleton.of(config, len(WORDS))
    parameters = skeleton.init(jax.random.key(1))
    loaded = LoadedModel(
        Experiment(name="run", model=config),
        skeleton.merge(parameters),
        load_tokenizer(str(tokenizer)),
        step=3,
    )
    monkeypatch.setattr("memtrain.train.load.load_model", lambda run, step: loaded)
    return parameters


def test_export_writes_a_folder_with_the_tokenizer(model, tmp_path, monkeypatch, capsys):
    parameters = run_of(CONFIG, monkeypatch, model[0])
    arguments = ["export", str(tmp_path), "--huggingface", str(tmp_path / "hf"), "--json"]
    assert main(arguments) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["model_type"] == "qwen3" and said["created_from"] == {"run": "run", "step": 3}
    assert load_tokenizer(str(tmp_path / "hf")).vocab_size == 8
    name = "blocks.0.ffn.layer.gate.weight"
    np.testing.assert_array_equal(load(tmp_path / "hf")[2][name], parameters[name])
    assert main(arguments) == 2 and "not empty" in capsys.readouterr().err


def test_export_names_the_layer_that_has_no_counterpart(model, tmp_path, monkeypatch, capsys):
    table = ProductKeyMemory(num_slots=16, num_heads=1, top_k=2, key_dim=4, value_dim=4)
    config = ModelConfig(dim=8, pattern=(Block(mixer=Attention(num_heads=2), ffn=table),))
    run_of(config, monkeypatch, model[0])
    assert main(["export", str(tmp_path), "--huggingface", str(tmp_path / "hf")]) == 2
    said = capsys.readouterr().err
    assert "layer 0, ffn: ProductKeyMemory has no counterpart in qwen3" in said
    assert said.count("\n") == 1 and not (tmp_path / "hf").exists()
