"""Weights and configs of transformers without it: round trips, and what is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from memtrain.errors import BadInput
from memtrain.interop.huggingface import (
    config_from_huggingface,
    config_to_huggingface,
    folder,
    load,
    save,
)
from memtrain.interop.huggingface.tensors import MATRIX, rule
from memtrain.layers import (
    Attention,
    Block,
    GatedDeltaNet,
    Mamba1,
    Mamba2,
    ModelConfig,
    MoE,
    ProductKeyMemory,
    SwiGLU,
    Window,
)
from memtrain.model.parameters import Skeleton


VOCAB, DIM = 11, 8
HEADS: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2}


def model(*pattern: Any, repeats: int = 2, **more: Any) -> ModelConfig:
    more = {"embedding_scale": 1.0, "tied_embeddings": False, "vocab_size": VOCAB} | more
    return ModelConfig(dim=DIM, pattern=pattern, repeats=repeats, **more)


def block(mixer: Any, ffn: Any = None) -> Block:
    return Block(mixer=mixer, ffn=ffn or SwiGLU(hidden=12))


ATTENTION = Attention(**HEADS, head_dim=2)
EXPERTS = MoE(num_experts=3, top_k=2, hidden=12, normalize=False)
SHARED = MoE(num_experts=3, top_k=2, hidden=12, shared_hidden=5, shared_gate=True)
JAMBA_MAMBA = Mamba1(state_dim=3, step_rank=2, inner_norm=True)
JAMBA_ATTENTION = Attention(**HEADS, head_dim=2, rope_theta=None, qk_norm=False)
PLAIN = Attention(**HEADS, head_dim=2, qk_norm=False)

MODELS = {
    "llama": model(block(PLAIN)),
    "mistral": model(block(dataclasses.replace(PLAIN, window=3)), tied_embeddings=True),
    "qwen3": model(block(ATTENTION), block(dataclasses.replace(ATTENTION, window=3)), repeats=1),
    "mamba": model(Block(mixer=Mamba1(state_dim=3, step_rank=2)), tied_embeddings=True),
    "mamba2": model(
        Block(mixer=Mamba2(head_dim=4, state_dim=3, num_groups=2, norm_groups=2)),
        norm_epsilon=1e-5,
    ),
    "jamba": model(block(JAMBA_MAMBA), block(JAMBA_ATTENTION, EXPERTS), block(JAMBA_MAMBA)),
    "qwen3_next": model(
        block(GatedDeltaNet(num_heads=4, num_key_heads=2, head_dim=2, value_dim=3), SHARED),
        block(dataclasses.replace(ATTENTION, rotary_dim=2, head_dim=4, output_gate=True), SHARED),
        repeats=1,
    ),
}


def drawn(config: ModelConfig, dtype: Any = np.float32) -> dict[str, Any]:
    """In 0.5..1.5, which norms that multiply by 1 + w keep bit by bit."""
    rng = np.random.default_rng(0)
    shapes = Skeleton.of(config, VOCAB).shapes
    return {name: rng.uniform(0.5, 1.5, s.shape).astype(dtype) for name, s in shapes.items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A folder to spoil copies of."""
    made = tmp_path_factory.mktemp("models") / "llama"
    save(made, MODELS["llama"], drawn(MODELS["llama"]))
    return made


def spoiled(source: Path, to: Path, tensors: dict[str, Any]) -> Path:
    """A copy with tensors changed; None takes one out."""
    to.mkdir()
    (to / "config.json").write_bytes((source / "config.json").read_bytes())
    changed = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor is None:
            del changed[name]
        else:
            changed[name] = tensor
    save_file(changed, to / "model.safetensors")
    return to


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_read_again_bit_by_bit(name, tmp_path):
    config = MODELS[name]
    parameters = drawn(config)
    save(tmp_path / "model", config, parameters)
    assert json.loads((tmp_path / "model/config.json").read_text())["model_type"] == name
    again, vocab_size, found = load(tmp_path / "model")
    assert vocab_size == VOCAB and list(found) == list(parameters)
    assert again.repeats == config.repeats
    for index, mine in enumerate(config.pattern):
        assert again.pattern[index] == mine
    assert dataclasses.replace(again, pattern=()) == dataclasses.replace(config, pattern=())
    for parameter, value in parameters.items():
        np.testing.assert_array_equal(found[parameter], value, err_msg=parameter)


def test_layouts_by_hand():
    """Two groups of one and two columns, out of a matrix of theirs that is [out, in]."""
    theirs = np.arange(12.0).reshape(6, 2)
    of = rule("w", "a", "b", layout=MATRIX, widths=(1, 2), groups=2)
    a, b = of.read([theirs])
    np.testing.assert_array_equal(a, [[0, 6], [1, 7]])
    np.testing.assert_array_equal(b, [[2, 4, 8, 10], [3, 5, 9, 11]])
    np.testing.assert_array_equal(of.write([a, b])[0], theirs)


def test_shards(llama, tmp_path, monkeypatch):
    whole = load(llama)[2]
    monkeypatch.setattr(folder, "MAX_SHARD_BYTES", 1000)
    save(tmp_path / "shards", MODELS["llama"], whole)
    files = sorted(f.name for f in (tmp_path / "shards").iterdir())
    assert len(files) > 3 and "model.safetensors.index.json" in files
    found = load(tmp_path / "shards")[2]
    assert all(np.array_equal(found[name], whole[name]) for name in whole)
    (tmp_path / "shards" / files[1]).unlink()
    with pytest.raises(BadInput, match=f"{files[1]} cannot be read"):
        load(tmp_path / "shards")


def test_bfloat16_is_read_as_float32_and_written_as_it_is(tmp_path):
    config = MODELS["qwen3_next"]
    parameters = drawn(config, ml_dtypes.bfloat16)
    save(tmp_path / "model", config, parameters)
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == "bfloat16"
    found = load(tmp_path / "model")[2]
    for name, value in parameters.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], value.astype(np.float32), err_msg=name)


def test_embeddings_that_are_scaled_as_they_are_read(tmp_path):
    """Our default, the square root of the width: theirs have it multiplied in."""
    config = dataclasses.replace(MODELS["mistral"], embedding_scale=4.0)
    parameters = drawn(config)
    save(tmp_path / "model", config, parameters)
    again, _, found = load(tmp_path / "model")
    assert again.embedding_scale == 1.0 and again.tied_embeddings
    np.testing.assert_array_equal(found["embedding"], 4 * parameters["embedding"])
    np.testing.assert_array_equal(found["final_norm.scale"], parameters["final_norm.scale"] / 4)


CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 6,
    "vocab_size": VOCAB,
}


def described(**keys: Any) -> dict[str, Any]:
    """A state space model has no attention to speak of."""
    whole = ("hidden_size", "num_hidden_layers", "vocab_size")
    mamba = keys.get("model_type") in ("mamba", "mamba2")
    return {k: v for k, v in CONFIG.items() if not mamba or k in whole} | keys


def mixers(**keys: Any) -> list[Any]:
    config, _ = config_from_huggingface(described(**keys))
    blocks = list(config.pattern) * config.repeats
    return [entry.mixer for entry in blocks if isinstance(entry, Block)]


def test_the_shortest_pattern_that_layers_repeat():
    kinds = ["full_attention", "sliding_attention", "sliding_attention"] * 2
    more = {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 5}
    config, _ = config_from_huggingface(CONFIG | more | {"layer_types": kinds, "head_dim": 2})
    assert (len(config.pattern), config.repeats) == (3, 2)
    config, _ = config_from_huggingface(CONFIG | more | {"max_window_layers": 5})
    assert (len(config.pattern), config.repeats) == (6, 1)
    assert [m.window for m in mixers(**more, max_window_layers=5)] == [None] * 5 + [5]


def test_keys_as_older_and_newer_versions_have_them():
    scaled = {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    assert mixers()[0].rope_theta == 10_000 and mixers(rope_theta=7)[0].rope_theta == 7.0
    assert mixers(**scaled)[0].rope_theta == 7.0 and mixers(rope_scaling=None)
    assert mixers(model_type="mistral")[0].window == 4096
    assert mixers(model_type="mistral", sliding_window=None)[0].window is None
    assert mixers(num_key_value_heads=None, head_dim=None)[0].num_kv_heads == 4
    next_ = mixers(model_type="qwen3_next", num_experts=0, full_attention_interval=3, head_dim=8)
    assert [type(m).__name__[:4] for m in next_] == ["Gate", "Gate", "Atte"] * 2
    assert next_[2].rotary_dim == 2


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is not known: there are llama, mistral, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' has no counterpart"),
        ({"attention_bias": True}, "attention_bias=True has no counterpart"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling=.*llama3"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
        ({"rope_parameters": {"rope_theta": 5.0, "beta_fast": 1}}, "beta_fast=1"),
        ({"rope_theta": 4.0, "rope_parameters": {"rope_theta": 5.0}}, "rope_theta is 4.0 and"),
        ({"quantization_config": {"bits": 4}}, "does not know what quantization_config="),
        ({"hidden_size": None}, "config.json: hidden_size is missing"),
        ({"hidden_size": "8"}, "hidden_size='8': expected a whole number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1: expected true or false"),
        ({"num_key_value_heads": 3}, "config.json: num_heads=4 is not a multiple of 3"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"] * 5}, "names 5 layers"),
        ({"model_type": "qwen3", "layer_types": ["chunked"] * 6}, "'chunked' is none of"),
        ({"model_type": "mamba", "use_bias": True}, "use_bias=True"),
        ({"model_type": "mamba", "use_conv_bias": False}, "use_conv_bias=False"),
        ({"model_type": "mamba", "expand": 1.5}, "expand=1.5: memtrain takes whole numbers"),
        ({"model_type": "mamba2", "num_heads": 3, "head_dim": 4}, "num_heads=3 of head_dim=4"),
        (
            {"model_type": "mamba2", "num_heads": 8, "head_dim": 2, "time_step_limit": [0, 1]},
            r"time_step_limit=\[0, 1\]",
        ),
        ({"model_type": "jamba", "attn_layer_offset": 8}, "attn_layer_offset=8 is no place in"),
        ({"model_type": "jamba", "mamba_proj_bias": True}, "mamba_proj_bias=True"),
        ({"model_type": "qwen3_next", "mlp_only_layers": [6]}, "there is no layer 6 of 6"),
    ],
)
def test_keys_that_are_refused(keys, said):
    with pytest.raises(BadInput, match=said) as error:
        config_from_huggingface(described(**keys))
    assert "\n" not in str(error.value) and str(error.value).count("config.json:") == 1


def test_tensors_that_are_missing_or_left_over(llama, tmp_path):
    gone, extra = "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"
    changed: dict[str, Any] = {gone: None, extra: np.zeros((2, 2), np.float32)}
    bad = spoiled(llama, tmp_path / "bad", changed)
    with pytest.raises(BadInput, match=f"llama .*missing {gone}; left over {extra}$"):
        load(bad)


def test_a_tensor_of_another_shape_or_kind(llama, tmp_path):
    name = "model.layers.0.self_attn.k_proj.weight"
    for number, tensor in enumerate((np.zeros((4, 7), np.float32), np.zeros((3,), np.float32))):
        bad = spoiled(llama, tmp_path / str(number), {name: tensor})
        with pytest.raises(BadInput, match=rf"{name} is .*, the config asks for \[4, 8\]"):
            load(bad)
    bad = spoiled(llama, tmp_path / "int8", {name: np.zeros((4, 8), np.int8)})
    with pytest.raises(BadInput, match=f"{name} is int8: memtrain reads floating point"):
        load(bad)


def test_a_convolution_of_another_shape(tmp_path):
    """One dimension less, and more channels than it has: neither is read as something else."""
    save(tmp_path / "mamba", MODELS["mamba"], drawn(MODELS["mamba"]))
    name = "backbone.layers.0.mixer.conv1d.weight"
    for number, shape in enumerate(((16, 4), (16, 2, 4))):
        changed = {name: np.zeros(shape, np.float32)}
        bad = spoiled(tmp_path / "mamba", tmp_path / str(number), changed)
        with pytest.raises(BadInput, match=rf"{name} is .*, the config asks for \[16, 1, 4\]"):
            load(bad)


@pytest.mark.parametrize(
    ("name", "key", "least"),
    [
        ("llama", "num_attention_heads", 1),
        ("llama", "num_hidden_layers", 1),
        ("mistral", "head_dim", 1),
        ("jamba", "attn_layer_period", 1),
        ("qwen3_next", "full_attention_interval", 1),
        ("qwen3_next", "decoder_sparse_step", 1),
    ],
)
def test_numbers_of_nothing(name, key, least):
    content = config_to_huggingface(MODELS[name], VOCAB)
    with pytest.raises(BadInput, match=f"{key}=0: it takes {least} or more"):
        config_from_huggingface(content | {key: 0})


def test_choices_without_effect_on_logits_are_exported():
    """How a model was sharded, balanced, begun and run."""
    plain = MODELS["jamba"]
    attention = dataclasses.replace(JAMBA_ATTENTION, backend="xla")
    mixture = dataclasses.replace(EXPERTS, parallel="experts", balance_loss=0.5, z_loss=0.1)
    chosen = (block(JAMBA_MAMBA), block(attention, mixture), block(JAMBA_MAMBA))
    chosen = dataclasses.replace(plain, pattern=chosen)
    assert config_to_huggingface(chosen, VOCAB) == config_to_huggingface(plain, VOCAB)


def test_a_mamba_with_feed_forward_layers_names_them():
    with pytest.raises(BadInput, match="layer 0, ffn: SwiGLU"):
        config_to_huggingface(model(block(Mamba1(state_dim=3, step_rank=2))), VOCAB)


def test_tensors_that_are_computed_or_copies_are_left(tmp_path):
    save(tmp_path / "tied", MODELS["mistral"], drawn(MODELS["mistral"]))
    more = {
        "lm_head.weight": np.ones((VOCAB, DIM), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones((1,), np.float32),
    }
    found = load(spoiled(tmp_path / "tied", tmp_path / "older", more))[2]
    assert "unembedding.weight" not in found


def test_folders_that_are_none(llama, tmp_path):
    with pytest.raises(BadInput, match=r"config.json cannot be read"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(BadInput, match=r"has neither model.safetensors nor"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"pickle")
    with pytest.raises(BadInput, match=r"model.safetensors cannot be read"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(BadInput, match=r"config.json is no JSON object"):
        load(tmp_path)
    with pytest.raises(BadInput, match="not empty: it is not overwritten"):
        save(llama, MODELS["llama"], drawn(MODELS["llama"]))
    with pytest.raises(BadInput, match="there is no folder"):
        save(tmp_path / "a" / "b", MODELS["llama"], drawn(MODELS["llama"]))


TABLE = ProductKeyMemory(num_slots=16, num_heads=1, top_k=2, key_dim=4, value_dim=4)


@pytest.mark.parametrize(
    "config, said",
    [
        (model(block(TABLE)), "layer 0, mixer: ProductKeyMemory has no counterpart"),
        (
            model(block(PLAIN), block(PLAIN, TABLE)),
            "layer 1, ffn: ProductKeyMemory has no counterpart in llama, which has SwiGLU there",
        ),
        (
            model(block(dataclasses.replace(ATTENTION, soft_cap=3.0))),
            "layer 0, mixer: Attention with soft_cap=3.0 has no counterpart in qwen3",
        ),
        (
            model(block(Window(3, **HEADS, qk_norm=False, sink_tokens=1))),
            "layer 0, mixer: Attention with sink_tokens=1 has no counterpart in mistral",
        ),
        (
            model(block(PLAIN), block(dataclasses.replace(PLAIN, window=3))),
            "layer 1, mixer: Attention with window=3 has no counterpart in mistral",
        ),
        (model(block(PLAIN, SwiGLU(hidden=9)), block(PLAIN)), "layer 1, ffn: .*hidden=12"),
        (model(Block(mixer=PLAIN)), "layer 0, ffn: nothing has no counterpart in llama"),
        (
            model(Block(mixer=PLAIN, ffn=SwiGLU(), residual_gate=True)),
            "layer 0: residual_gate=True has no counterpart",
        ),
        (
            model(block(JAMBA_MAMBA), block(JAMBA_ATTENTION), block(JAMBA_ATTENTION)),
            "layers 1, 2, 4, 5 of 6 have Attention: jamba says it of every n-th layer",
        ),
        (model(block(GatedDeltaNet(head_dim=2)), block(JAMBA_MAMBA)), "layers of GatedDelta and M"),
        (
            model(Block(mixer=Mamba2(head_dim=4, num_groups=2))),
            "layer 0, mixer: Mamba2 with norm_groups=1 has no counterpart in mamba2, whose layer "
            "here would have 2",
        ),
    ],
)
def test_models_without_a_counterpart(config, said):
    with pytest.raises(BadInput, match=said):
        config_to_huggingface(config, VOCAB)


def test_an_architecture_that_is_asked_for():
    config = MODELS["llama"]
    assert config_to_huggingface(config, VOCAB, architecture="mistral")["sliding_window"] is None
    for name, said in (("jamba", "a jamba has Mamba1, and"), ("gpt2", "'gpt2' is not known")):
        with pytest.raises(BadInput, match=said):
            config_to_huggingface(config, VOCAB, architecture=name)


def test_parameters_of_another_model(tmp_path):
    parameters = drawn(MODELS["llama"])
    odd = {n: a for n, a in parameters.items() if n != "final_norm.scale"}
    with pytest.raises(BadInput, match=r"not those of the model: final_norm.scale"):
        save(tmp_path / "a", MODELS["llama"], odd)
    odd |= {"final_norm.scale": jnp.ones((3,))}
    with pytest.raises(BadInput, match=r"final_norm.scale is \[3\], the model's \[8\]"):
        save(tmp_path / "a", MODELS["llama"], odd)
    assert not (tmp_path / "a").exists()
