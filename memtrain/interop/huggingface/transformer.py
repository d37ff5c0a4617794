"""Llama, Mistral and Qwen3: attention and a gated feed-forward layer.

Layouts after `transformers` 5.23 (Apache-2.0): `modeling_llama.py`, `modeling_mistral.py`,
`modeling_qwen3.py`.
"""

from __future__ import annotations

from typing import Any

from memtrain.interop.huggingface.architecture import (
    Architecture,
    Json,
    Plain,
    attention_of,
    head,
    layer_types,
    place_norms,
    projections,
    write_head,
)
from memtrain.interop.huggingface.keys import Keys, rope
from memtrain.interop.huggingface.tensors import Rule, rule, swiglu
from memtrain.memory.attention import AttentionConfig
from memtrain.model.config import Block
from memtrain.model.feed_forward import SwiGLUConfig


FULL, SLIDING = "full_attention", "sliding_attention"


def heads(
    keys: Keys, dim: int, *, kv_heads: int | None = None, head_dim: int | None = None
) -> Json:
    """Fields of an attention layer that are of heads.

    kv_heads, head_dim: what the architecture takes for a key that is left out. A null, or what has
      no such default, is derived: as many heads, and the width over them.
    """
    number = keys.integer("num_attention_heads")
    return {
        "num_heads": number,
        "num_kv_heads": keys.integer_or_null("num_key_value_heads", kv_heads or number) or number,
        "head_dim": keys.integer_or_null("head_dim", head_dim or dim // number) or dim // number,
    }


def write_heads(attention: AttentionConfig) -> Json:
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
    }


def write_rope(attention: AttentionConfig) -> Json:
    """For transformers since 5, and before."""
    theta = attention.rope_theta
    return {
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rope_theta": theta,
    }


def neutral(keys: Keys) -> None:
    """What all three leave out here."""
    keys.must_be("hidden_act", "silu", "swish")
    keys.must_be("attention_dropout", 0.0)
    keys.must_be("attention_bias", False)
    keys.must_be("mlp_bias", False)


def _read(keys: Keys, windows: list[int | None], shape: Json, **attention: Any) -> Plain:
    whole = head(keys)
    theta, fraction = rope(keys)
    ffn = SwiGLUConfig(keys.integer("intermediate_size"))
    attention |= heads(keys, whole["dim"], **shape)
    if fraction != 1:
        attention["rotary_dim"] = int(attention["head_dim"] * fraction)
    make = lambda window: Block(  # noqa: E731
        mixer=AttentionConfig(window=window, rope_theta=theta, **attention), ffn=ffn
    )
    neutral(keys)
    return Plain(blocks=tuple(make(window) for window in windows), **whole)


def _write(model: Plain) -> Json:
    first, ffn = attention_of(model)[0], model.blocks[0].ffn
    return {
        **write_head(model),
        **write_heads(first),
        **write_rope(first),
        "intermediate_size": ffn.hidden if isinstance(ffn, SwiGLUConfig) else None,
        "attention_dropout": 0.0,
    }


def read_llama(keys: Keys) -> Plain:
    keys.inert("pretraining_tp")  # how products are cut into pieces that are added up
    keys.must_be("partial_rotary_factor", 1.0)
    return _read(keys, [None] * keys.integer("num_hidden_layers"), {}, qk_norm=False)


def write_llama(model: Plain) -> Json:
    return {**_write(model), "attention_bias": False, "mlp_bias": False}


def read_mistral(keys: Keys) -> Plain:
    window = keys.integer_or_null("sliding_window", 4096)
    keys.must_be("partial_rotary_factor", 1.0)
    depth = keys.integer("num_hidden_layers")
    return _read(keys, [window] * depth, {"kv_heads": 8}, qk_norm=False)


def write_mistral(model: Plain) -> Json:
    return {**_write(model), "sliding_window": attention_of(model)[0].window}


def read_qwen3(keys: Keys) -> Plain:
    depth = keys.integer("num_hidden_layers")
    window = keys.integer_or_null("sliding_window", 4096)
    if not keys.flag("use_sliding_window", False):
        window = None
    full_layers = keys.integer("max_window_layers", 28, least=0)
    kinds = layer_types(
        keys,
        depth,
        (FULL, SLIDING),
        [SLIDING if window is not None and i >= full_layers else FULL for i in range(depth)],
    )
    windows = [window if kind == SLIDING else None for kind in kinds]
    return _read(keys, windows, {"kv_heads": 32, "head_dim": 128}, qk_norm=True)


def write_qwen3(model: Plain) -> Json:
    windows = [attention.window for attention in attention_of(model)]
    window = next((w for w in windows if w is not None), None)
    # Where no layer is named before the first window, older transformers make the same of it.
    full = next((i for i, w in enumerate(windows) if w is not None), len(windows))
    return {
        **_write(model),
        "attention_bias": False,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": full,
        "layer_types": [FULL if w is None else SLIDING for w in windows],
    }


def _rules(block: Block, dim: int) -> list[Rule]:
    rules = [
        *place_norms("input_layernorm.weight", "post_attention_layernorm.weight"),
        *projections("self_attn.", q_proj="query", k_proj="key", v_proj="value", o_proj="output"),
        *swiglu("mlp.", "ffn.layer."),
    ]
    if isinstance(block.mixer, AttentionConfig) and block.mixer.qk_norm:
        rules += [
            rule("self_attn.q_norm.weight", "mixer.layer.query_norm.scale"),
            rule("self_attn.k_norm.weight", "mixer.layer.key_norm.scale"),
        ]
    return rules


LLAMA = Architecture(
    model_type="llama",
    class_name="LlamaForCausalLM",
    read=read_llama,
    write=write_llama,
    mixers=(AttentionConfig,),
    ffns=(SwiGLUConfig,),
    needs=(AttentionConfig,),
    rules=_rules,
)
MISTRAL = Architecture(
    model_type="mistral",
    class_name="MistralForCausalLM",
    read=read_mistral,
    write=write_mistral,
    mixers=(AttentionConfig,),
    ffns=(SwiGLUConfig,),
    needs=(AttentionConfig,),
    rules=_rules,
)
QWEN3 = Architecture(
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    read=read_qwen3,
    write=write_qwen3,
    mixers=(AttentionConfig,),
    ffns=(SwiGLUConfig,),
    needs=(AttentionConfig,),
    rules=_rules,
)
