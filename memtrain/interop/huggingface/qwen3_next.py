"""Qwen3-Next: Gated DeltaNet, gated attention every fourth layer, experts with a shared one.

Layouts after `transformers` 5.23 (Apache-2.0): `modeling_qwen3_next.py`. Its norms multiply by
1 + w, but for the one of the delta rule's output.
"""

from __future__ import annotations

from memtrain.errors import BadInput
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
from memtrain.interop.huggingface.tensors import (
    MATRIX,
    TAPS,
    ZERO_CENTRED,
    Rule,
    experts,
    rule,
    swiglu,
)
from memtrain.interop.huggingface.transformer import heads, write_heads, write_rope
from memtrain.memory.attention import AttentionConfig
from memtrain.memory.gated_delta import GatedDeltaConfig
from memtrain.model.config import Block
from memtrain.model.feed_forward import SwiGLUConfig
from memtrain.model.moe import MoEConfig


FULL, LINEAR = "full_attention", "linear_attention"


def read(keys: Keys) -> Plain:
    whole = head(keys)
    dim, depth = whole["dim"], keys.integer("num_hidden_layers")
    theta, fraction = rope(keys, 0.25)
    shape = heads(keys, dim, kv_heads=2, head_dim=256)
    attention = AttentionConfig(
        **shape,
        rope_theta=theta,
        rotary_dim=None if fraction == 1 else int(shape["head_dim"] * fraction),
        output_gate=True,
    )
    delta = GatedDeltaConfig(
        num_heads=keys.integer("linear_num_value_heads", 32),
        num_key_heads=keys.integer("linear_num_key_heads", 16),
        head_dim=keys.integer("linear_key_head_dim", 128),
        value_dim=keys.integer("linear_value_head_dim", 128),
        conv=keys.integer("linear_conv_kernel_dim", 4),
    )
    every = keys.integer("full_attention_interval", 4)
    default = [LINEAR if (i + 1) % every else FULL for i in range(depth)]
    kinds = layer_types(keys, depth, (FULL, LINEAR), default)
    dense, mixture = SwiGLUConfig(keys.integer("intermediate_size")), _read_mixture(keys)
    sparse_step = keys.integer("decoder_sparse_step", 1)
    dense_layers = keys.items("mlp_only_layers", [])
    if stray := [i for i in dense_layers if i not in range(depth)]:
        raise BadInput(f"{keys.source}: mlp_only_layers: there is no layer {stray[0]!r} of {depth}")
    blocks = tuple(
        Block(
            mixer=attention if kind == FULL else delta,
            ffn=dense if mixture is None or i in dense_layers or (i + 1) % sparse_step else mixture,
        )
        for i, kind in enumerate(kinds)
    )
    keys.must_be("hidden_act", "silu", "swish")
    keys.must_be("attention_dropout", 0.0)
    keys.must_be("attention_bias", False)
    keys.must_be("use_sliding_window", False)
    keys.inert("router_aux_loss_coef", "output_router_logits")  # the training loss
    return Plain(blocks=blocks, **whole)


def _read_mixture(keys: Keys) -> MoEConfig | None:
    number = keys.integer("num_experts", 512, least=0)
    made = {
        "top_k": keys.integer("num_experts_per_tok", 10),
        "hidden": keys.integer("moe_intermediate_size", 512),
        "normalize": keys.flag("norm_topk_prob", True),
        "shared_hidden": keys.integer("shared_expert_intermediate_size", 512),
        "shared_gate": True,
    }
    return MoEConfig(number, **made) if number else None


def write(model: Plain) -> Json:
    delta = next(b.mixer for b in model.blocks if isinstance(b.mixer, GatedDeltaConfig))
    attention = next(iter(attention_of(model)), AttentionConfig(num_kv_heads=4, head_dim=64))
    mixture = next((b.ffn for b in model.blocks if isinstance(b.ffn, MoEConfig)), None)
    dense = next((b.ffn for b in model.blocks if isinstance(b.ffn, SwiGLUConfig)), None)
    attends = [isinstance(block.mixer, AttentionConfig) for block in model.blocks]
    denses = [isinstance(block.ffn, SwiGLUConfig) for block in model.blocks]
    head_dim = attention.head_dim or 0
    fraction = (attention.rotary_dim or head_dim) / head_dim
    rope = write_rope(attention)
    rope["rope_parameters"]["partial_rotary_factor"] = fraction
    if mixture is None:
        more: Json = {"num_experts": 0}
    else:
        more = {
            "num_experts": mixture.num_experts,
            "num_experts_per_tok": mixture.top_k,
            "moe_intermediate_size": mixture.hidden,
            "norm_topk_prob": mixture.normalize,
            "shared_expert_intermediate_size": mixture.shared_hidden,
        }
    return {
        **write_head(model),
        **write_heads(attention),
        **rope,
        "partial_rotary_factor": fraction,
        "linear_num_value_heads": delta.num_heads,
        "linear_num_key_heads": delta.num_key_heads,
        "linear_key_head_dim": delta.head_dim,
        "linear_value_head_dim": delta.value_dim,
        "linear_conv_kernel_dim": delta.conv,
        "intermediate_size": dense.hidden if dense else model.dim,
        "layer_types": [FULL if a else LINEAR for a in attends],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, is_dense in enumerate(denses) if is_dense],
        "attention_dropout": 0.0,
        "attention_bias": False,
        **more,
    }


def _rules(block: Block, dim: int) -> list[Rule]:
    rules = place_norms("input_layernorm.weight", "post_attention_layernorm.weight", ZERO_CENTRED)
    if isinstance(block.mixer, GatedDeltaConfig):
        rules += _delta_rules(block.mixer)
    elif isinstance(block.mixer, AttentionConfig):
        rules += _attention_rules(block.mixer)
    if not isinstance(block.ffn, MoEConfig):
        return [*rules, *swiglu("mlp.", "ffn.layer.")]
    return [
        *rules,
        rule("mlp.gate.weight", "ffn.layer.router.weight", layout=MATRIX),
        *experts("mlp.experts.", "ffn.layer.", block.ffn.num_experts),
        *swiglu("mlp.shared_expert.", "ffn.layer.shared."),
        rule("mlp.shared_expert_gate.weight", "ffn.layer.shared_gate.weight", layout=MATRIX),
    ]


def _attention_rules(attention: AttentionConfig) -> list[Rule]:
    channels = attention.head_dim or 0
    return [
        # Of every head its query, then its gate.
        rule(
            "self_attn.q_proj.weight",
            "mixer.layer.query.weight",
            "mixer.layer.output_gate.weight",
            layout=MATRIX,
            widths=(channels, channels),
            groups=attention.num_heads,
        ),
        *projections("self_attn.", k_proj="key", v_proj="value", o_proj="output"),
        rule("self_attn.q_norm.weight", "mixer.layer.query_norm.scale", layout=ZERO_CENTRED),
        rule("self_attn.k_norm.weight", "mixer.layer.key_norm.scale", layout=ZERO_CENTRED),
    ]


def _delta_rules(delta: GatedDeltaConfig) -> list[Rule]:
    shape, theirs, ours = delta.shape, "linear_attn.", "mixer.layer."
    parts = ("query", "key", "value")
    # Of every key head its query, key, and the values and gates of the heads that share it.
    groups = shape.num_key_heads
    shared = shape.num_heads // groups
    widths = (shape.key_dim, shape.key_dim, shared * shape.value_dim, shared * shape.value_dim)
    return [
        rule(
            f"{theirs}in_proj_qkvz.weight",
            *(f"{ours}{name}.weight" for name in (*parts, "gate")),
            layout=MATRIX,
            widths=widths,
            groups=groups,
        ),
        rule(
            f"{theirs}in_proj_ba.weight",
            f"{ours}erase_gate.weight",
            f"{ours}decay.weight",
            layout=MATRIX,
            widths=(shared, shared),
            groups=groups,
        ),
        rule(
            f"{theirs}conv1d.weight",
            *(f"{ours}{part}_conv.taps" for part in parts),
            layout=TAPS,
            widths=[shape.width(part) for part in parts],
        ),
        rule(f"{theirs}dt_bias", f"{ours}step_bias"),
        rule(f"{theirs}A_log", f"{ours}log_rate"),
        rule(f"{theirs}norm.weight", f"{ours}norm.scale"),
        *projections(theirs, out_proj="output"),
    ]


QWEN3_NEXT = Architecture(
    model_type="qwen3_next",
    class_name="Qwen3NextForCausalLM",
    read=read,
    write=write,
    mixers=(AttentionConfig, GatedDeltaConfig),
    ffns=(SwiGLUConfig, MoEConfig),
    needs=(GatedDeltaConfig,),
    rules=_rules,
    norm=ZERO_CENTRED,
    ignored=("mtp.",),  # predicts further tokens, for speculative decoding
)
