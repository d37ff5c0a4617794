"""The oracle: `transformers` itself, in a process and an environment of its own.

    PYTHON tests/interop/oracle.py OUT

Writes OUT/NAME for each architecture: config.json, model.safetensors, tokens.npy [B, T] and
logits.npy [B, T, V], of a small random model whose every parameter is drawn away from its default.
Then reads the names of folders from its standard input, one a line. Each is loaded as
AutoModelForCausalLM.from_pretrained does; logits.npy is written beside its tokens.npy, and
loading.json with the keys that were missing or unexpected. Says "done" after OUT and each folder.

Imports torch and transformers, and nothing of memtrain.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM


VOCAB, BATCH, TOKENS = 96, 2, 72
"""Longer than the windows below, and than a chunk of the delta rule, which is 64."""
EPSILON = 0.02
"""Large, so that a norm with another one is felt."""

ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE = {"vocab_size": VOCAB, "hidden_size": 32}
DENSE = SHAPE | {"intermediate_size": 48}


def configs() -> dict[str, Any]:
    """What each architecture is asked for: none of it as it is by default."""
    rope = {"rope_type": "default", "rope_theta": 500.0}
    t = transformers
    return {
        "llama": t.LlamaConfig(
            **DENSE, **ATTENTION, num_hidden_layers=2, rms_norm_eps=EPSILON, rope_parameters=rope
        ),
        "mistral": t.MistralConfig(
            **DENSE,
            **ATTENTION,
            num_hidden_layers=2,
            head_dim=12,
            sliding_window=11,
            rms_norm_eps=EPSILON,
            rope_parameters=rope,
            tie_word_embeddings=True,
        ),
        "qwen3": t.Qwen3Config(
            **DENSE,
            **ATTENTION,
            num_hidden_layers=3,
            head_dim=12,
            use_sliding_window=True,
            sliding_window=11,
            max_window_layers=2,
            rms_norm_eps=EPSILON,
            rope_parameters=rope,
        ),
        "mamba": t.MambaConfig(
            **SHAPE,
            num_hidden_layers=2,
            state_size=6,
            time_step_rank=5,
            conv_kernel=3,
            layer_norm_epsilon=EPSILON,
        ),
        "mamba2": t.Mamba2Config(
            **SHAPE,
            num_hidden_layers=2,
            num_heads=8,
            head_dim=8,
            state_size=6,
            n_groups=2,
            chunk_size=16,
            layer_norm_epsilon=EPSILON,
        ),
        "jamba": t.JambaConfig(
            **DENSE,
            **ATTENTION,
            num_hidden_layers=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=0,
            num_experts=5,
            num_experts_per_tok=2,
            mamba_d_state=6,
            mamba_dt_rank=5,
            rms_norm_eps=EPSILON,
        ),
        "qwen3_next": t.Qwen3NextConfig(
            **DENSE,
            **ATTENTION,
            num_hidden_layers=4,
            layer_types=["linear_attention", "full_attention"] * 2,
            head_dim=16,
            linear_key_head_dim=8,
            linear_value_head_dim=12,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=20,
            num_experts=6,
            num_experts_per_tok=2,
            rms_norm_eps=EPSILON,
            rope_parameters=rope | {"partial_rotary_factor": 0.5},
        ),
    }


@torch.no_grad()
def draw(model: Any, seed: int) -> None:
    """Matrices scaled by their fan-in; norms, biases, steps and rates away from their defaults."""
    normal = np.random.default_rng(seed).standard_normal
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        last = name.split(".")[-1]
        drawn = normal(shape)
        if last == "A_log":  # rates of about a half to two
            value = 0.7 * drawn
        elif last == "dt_bias" or name.endswith("dt_proj.bias"):  # steps of about a tenth to one
            value = drawn - 1.0
        elif "norm" in name or last == "D":
            centre = 0.0 if parameter.detach().abs().max() == 0 else 1.0
            value = centre + 0.3 * drawn
        elif last == "bias":
            value = 0.5 * drawn
        elif "embed" in name:
            value = drawn
        else:
            value = drawn / math.sqrt(shape[-1])
        parameter.copy_(torch.from_numpy(np.asarray(value, np.float32)))


@torch.no_grad()
def logits_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    return model.eval()(torch.from_numpy(tokens).long()).logits.float().numpy()


def make(out: Path) -> None:
    """The models of `configs`."""
    rng = np.random.default_rng(0)
    for seed, (name, config) in enumerate(configs().items()):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        draw(model, seed)
        model.save_pretrained(out / name)
        tokens = rng.integers(0, VOCAB, (BATCH, TOKENS)).astype(np.int32)
        np.save(out / name / "tokens.npy", tokens)
        np.save(out / name / "logits.npy", logits_of(model, tokens))


def read(folder: Path) -> None:
    """A model that somebody else wrote."""
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    said = {key: sorted(map(str, value)) for key, value in loading.items() if value}
    (folder / "loading.json").write_text(json.dumps(said))
    np.save(folder / "logits.npy", logits_of(model, np.load(folder / "tokens.npy")))


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    make(Path(sys.argv[1]))
    print("done", flush=True)
    for line in sys.stdin:
        read(Path(line.strip()))
        print("done", flush=True)
