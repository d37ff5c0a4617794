"""Jamba: Mamba with norms inside, attention without positions now and then, mixtures of experts.

Layouts after `transformers` 5.23 (Apache-2.0): `modeling_jamba.py`; Lieber et al. 2024, arXiv
2403.19887.
"""

from __future__ import annotations

from collections.abc import Sequence

from memtrain.description import LayerDescription
from memtrain.errors import BadInput
from memtrain.interop.huggingface.architecture import (
    Architecture,
    Json,
    Names,
    Plain,
    attention_of,
    head,
    place_norms,
    projections,
    write_head,
)
from memtrain.interop.huggingface.keys import Keys
from memtrain.interop.huggingface.mamba import mamba1_rules, step_rank
from memtrain.interop.huggingface.tensors import MATRIX, Rule, experts, rule, swiglu
from memtrain.interop.huggingface.transformer import heads
from memtrain.memory.attention import AttentionConfig
from memtrain.memory.mamba1 import Mamba1Config
from memtrain.model.config import Block
from memtrain.model.feed_forward import SwiGLUConfig
from memtrain.model.moe import MoEConfig


def read(keys: Keys) -> Plain:
    whole = head(keys)
    dim, depth = whole["dim"], keys.integer("num_hidden_layers")
    attention = AttentionConfig(**heads(keys, dim, kv_heads=8), rope_theta=None, qk_norm=False)
    mamba = Mamba1Config(
        expand=keys.integer("mamba_expand", 2),
        state_dim=keys.integer("mamba_d_state", 16),
        step_rank=step_rank(keys, "mamba_dt_rank", dim),
        conv=keys.integer("mamba_d_conv", 4),
        inner_norm=True,
    )
    hidden = keys.integer("intermediate_size")
    # Layers that have "1 expert" have no router.
    number = keys.integer("num_experts", 16)
    top_k = keys.integer("num_experts_per_tok", 2)
    dense: LayerDescription = SwiGLUConfig(hidden)
    mixture = dense if number == 1 else MoEConfig(number, top_k, hidden, normalize=False)

    def every(period: str, offset: str, defaults: tuple[int, int]) -> list[bool]:
        p, o = keys.integer(period, defaults[0]), keys.integer(offset, defaults[1], least=0)
        if not 0 <= o < p:
            raise BadInput(f"{keys.source}: {offset}={o} is no place in {period}={p} layers")
        return [i % p == o for i in range(depth)]

    attends = every("attn_layer_period", "attn_layer_offset", (8, 4))
    mixes = every("expert_layer_period", "expert_layer_offset", (2, 1))
    blocks = tuple(
        Block(mixer=attention if a else mamba, ffn=mixture if m else dense)
        for a, m in zip(attends, mixes, strict=True)
    )
    keys.must_be("hidden_act", "silu", "swish")
    keys.must_be("attention_dropout", 0.0)
    keys.must_be("mamba_conv_bias", True)
    keys.must_be("mamba_proj_bias", False)
    keys.must_be("mamba_inner_layernorms", True)
    # Which program computes the same; the training loss; which logits are given.
    keys.inert("use_mamba_kernels", "use_mambapy", "use_associative_scan")
    keys.inert("router_aux_loss_coef", "output_router_logits", "calc_logits_for_entire_prompt")
    keys.inert("num_logits_to_keep", "n_ctx")
    return Plain(blocks=blocks, **whole)


def write(model: Plain) -> Json:
    mambas = [b.mixer for b in model.blocks if isinstance(b.mixer, Mamba1Config)]
    mixtures = [b.ffn for b in model.blocks if isinstance(b.ffn, MoEConfig)]
    hidden = getattr(model.blocks[0].ffn, "hidden", None)
    attention, mamba = attention_of(model), mambas[0]
    attends = [isinstance(b.mixer, AttentionConfig) for b in model.blocks]
    mixes = [isinstance(b.ffn, MoEConfig) for b in model.blocks]
    period, offset = _period("Attention", attends)
    expert_period, expert_offset = _period("MoE", mixes)
    return {
        **write_head(model),
        "num_attention_heads": attention[0].num_heads,
        "num_key_value_heads": attention[0].num_kv_heads,
        "intermediate_size": hidden,
        "mamba_expand": mamba.expand,
        "mamba_d_state": mamba.state_dim,
        "mamba_dt_rank": mamba.step_rank,
        "mamba_d_conv": mamba.conv,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "num_experts": mixtures[0].num_experts if mixtures else 1,
        "num_experts_per_tok": mixtures[0].top_k if mixtures else 1,
        "attn_layer_period": period,
        "attn_layer_offset": offset,
        "expert_layer_period": expert_period,
        "expert_layer_offset": expert_offset,
        "attention_dropout": 0.0,
    }


def _period(what: str, there: Sequence[bool]) -> tuple[int, int]:
    """(period, offset) of the layers that are. Raises BadInput where no such pair says it."""
    depth = len(there)
    if not any(there):
        return depth + 1, depth
    first = there.index(True)
    for period in range(first + 1, depth + 1):
        if all(t == (i % period == first) for i, t in enumerate(there)):
            return period, first
    at = ", ".join(str(i) for i, t in enumerate(there) if t)
    raise BadInput(
        f"layers {at} of {depth} have {what}: jamba says it of every n-th layer from one on, and "
        "no n does"
    )


def _rules(block: Block, dim: int) -> list[Rule]:
    rules = place_norms("input_layernorm.weight", "pre_ff_layernorm.weight")
    if isinstance(block.mixer, Mamba1Config):
        rules += mamba1_rules(block.mixer, dim, "mamba.")
        rules += [
            rule(f"mamba.{their}_layernorm.weight", f"mixer.layer.{our}_norm.scale")
            for their, our in (("dt", "step"), ("b", "key"), ("c", "query"))
        ]
    else:
        names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
        rules += projections("self_attn.", **names)
    if isinstance(block.ffn, MoEConfig):
        router = rule("feed_forward.router.weight", "ffn.layer.router.weight", layout=MATRIX)
        number = block.ffn.num_experts
        return [*rules, router, *experts("feed_forward.experts.", "ffn.layer.", number)]
    return [*rules, *swiglu("feed_forward.", "ffn.layer.")]


JAMBA = Architecture(
    model_type="jamba",
    class_name="JambaForCausalLM",
    read=read,
    write=write,
    mixers=(AttentionConfig, Mamba1Config),
    ffns=(SwiGLUConfig, MoEConfig),
    needs=(AttentionConfig, Mamba1Config),
    rules=_rules,
    names=Names(final_norm="model.final_layernorm.weight"),
)
