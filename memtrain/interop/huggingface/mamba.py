"""Mamba and Mamba-2: state space layers and nothing else.

Layouts after `transformers` 5.23 (Apache-2.0): `modeling_mamba.py`, `modeling_mamba2.py`.
"""

from __future__ import annotations

from types import NoneType

from memtrain.errors import BadInput
from memtrain.interop.huggingface.architecture import (
    Architecture,
    Json,
    Names,
    Plain,
    head,
    place_norms,
    projections,
    write_head,
)
from memtrain.interop.huggingface.keys import Keys
from memtrain.interop.huggingface.tensors import MATRIX, TAPS, Rule, rule
from memtrain.memory.mamba1 import Mamba1Config
from memtrain.memory.mamba2 import Mamba2Config
from memtrain.model.config import Block


EPSILON = "layer_norm_epsilon"
NAMES = Names(
    embedding="backbone.embeddings.weight",
    final_norm="backbone.norm_f.weight",
    layer="backbone.layers.{}.",
)


def whole_number(keys: Keys, name: str, default: int) -> int:
    """A number that may be written 2.0."""
    value = keys.number(name, default)
    if value != int(value):
        raise BadInput(f"{keys.source}: {name}={value}: memtrain takes whole numbers")
    return int(value)


def step_rank(keys: Keys, name: str, dim: int) -> int:
    """ "auto" is a sixteenth of the width, rounded up."""
    if keys.content.get(name, "auto") == "auto":
        keys.inert(name)
        return -(-dim // 16)
    return keys.integer(name)


def _neutral(keys: Keys) -> None:
    keys.must_be("hidden_act", "silu", "swish")
    keys.must_be("use_bias", False)
    keys.must_be("use_conv_bias", True)
    # How the parameters are drawn; whether sums are float32, which they are here.
    keys.inert("time_step_scale", "time_step_min", "time_step_max", "time_step_init_scheme")
    keys.inert("time_step_floor", "rescale_prenorm_residual", "residual_in_fp32")


def read_mamba(keys: Keys) -> Plain:
    whole = head(keys, tied=True, epsilon=EPSILON)
    dim, depth = whole["dim"], keys.integer("num_hidden_layers")
    mixer = Mamba1Config(
        expand=whole_number(keys, "expand", 2),
        state_dim=keys.integer("state_size", 16),
        step_rank=step_rank(keys, "time_step_rank", dim),
        conv=keys.integer("conv_kernel", 4),
    )
    keys.must_be("intermediate_size", mixer.expand * dim)
    # The names that the authors' code has for the same.
    keys.must_be("d_model", dim)
    keys.must_be("d_inner", mixer.expand * dim)
    keys.must_be("n_layer", depth)
    keys.must_be("ssm_cfg", {})
    keys.must_be("rms_norm", True)
    keys.inert("fused_add_norm", "pad_vocab_size_multiple", "use_mambapy", "use_associative_scan")
    _neutral(keys)
    return Plain(blocks=(Block(mixer=mixer),) * depth, **whole)


def write_mamba(model: Plain) -> Json:
    mixer = model.blocks[0].mixer
    assert isinstance(mixer, Mamba1Config)
    return {
        **write_head(model, epsilon=EPSILON),
        "expand": mixer.expand,
        "intermediate_size": mixer.expand * model.dim,
        "state_size": mixer.state_dim,
        "time_step_rank": mixer.step_rank,
        "conv_kernel": mixer.conv,
        "use_bias": False,
        "use_conv_bias": True,
    }


def mamba1_rules(mixer: Mamba1Config, dim: int, theirs: str) -> list[Rule]:
    """Of a `Mamba1`, without its inner norms."""
    inner, n = mixer.expand * dim, mixer.state_dim
    ours = lambda *names: [f"mixer.layer.{name}" for name in names]  # noqa: E731
    rank = mixer.step_rank or -(-dim // 16)
    return [
        rule(
            f"{theirs}in_proj.weight",
            *ours("value.weight", "gate.weight"),
            layout=MATRIX,
            widths=(inner, inner),
        ),
        rule(f"{theirs}conv1d.weight", *ours("conv.taps"), layout=TAPS),
        rule(f"{theirs}conv1d.bias", *ours("conv.bias")),
        rule(
            f"{theirs}x_proj.weight",
            *ours("step_in.weight", "key.weight", "query.weight"),
            layout=MATRIX,
            widths=(rank, n, n),
        ),
        rule(f"{theirs}dt_proj.bias", *ours("step_bias")),
        rule(f"{theirs}A_log", *ours("log_rate")),
        rule(f"{theirs}D", *ours("skip")),
        *projections(theirs, dt_proj="step", out_proj="output"),
    ]


def _mamba_rules(block: Block, dim: int) -> list[Rule]:
    assert isinstance(block.mixer, Mamba1Config)
    return [*place_norms("norm.weight"), *mamba1_rules(block.mixer, dim, "mixer.")]


def read_mamba2(keys: Keys) -> Plain:
    whole = head(keys, epsilon=EPSILON)
    dim, depth = whole["dim"], keys.integer("num_hidden_layers")
    groups = keys.integer("n_groups", 8)
    mixer = Mamba2Config(
        expand=whole_number(keys, "expand", 2),
        head_dim=keys.integer("head_dim", 64),
        state_dim=keys.integer("state_size", 128),
        num_groups=groups,
        norm_groups=groups,
        conv=keys.integer("conv_kernel", 4),
    )
    number = keys.integer("num_heads", 128)
    if number * mixer.head_dim != mixer.expand * dim:
        raise BadInput(
            f"{keys.source}: num_heads={number} of head_dim={mixer.head_dim} are not expand * "
            f"hidden_size = {mixer.expand * dim} channels"
        )
    keys.must_be("intermediate_size", mixer.expand * dim)
    # JSON has no infinity: transformers writes it in one of these ways.
    infinity = float("inf")
    limits = ([0.0, infinity], [0.0, {"__float__": "Infinity"}], [0.0, "Infinity"])
    keys.must_be("time_step_limit", *limits)
    # How the scan is cut into pieces; what transformers itself does not read.
    keys.inert("chunk_size", "time_step_rank", "norm_before_gate", "pad_vocab_size_multiple")
    keys.inert("emb_initializer_range", "conv_initializer_range", "A_initializer_range")
    keys.must_be("rms_norm", True)
    _neutral(keys)
    return Plain(blocks=(Block(mixer=mixer),) * depth, **whole)


def write_mamba2(model: Plain) -> Json:
    mixer = model.blocks[0].mixer
    assert isinstance(mixer, Mamba2Config)
    return {
        **write_head(model, epsilon=EPSILON),
        "expand": mixer.expand,
        "num_heads": mixer.shape(model.dim).num_heads,
        "head_dim": mixer.head_dim,
        "state_size": mixer.state_dim,
        "n_groups": mixer.num_groups,
        "conv_kernel": mixer.conv,
        "use_bias": False,
        "use_conv_bias": True,
    }


def _mamba2_rules(block: Block, dim: int) -> list[Rule]:
    mixer = block.mixer
    assert isinstance(mixer, Mamba2Config)
    shape = mixer.shape(dim)
    parts = ("value", "key", "query")
    widths = tuple(shape.width(part) for part in parts)
    ours = lambda kind: [f"mixer.layer.{part}{kind}" for part in parts]  # noqa: E731
    return [
        *place_norms("norm.weight"),
        rule(
            "mixer.in_proj.weight",
            "mixer.layer.gate.weight",
            *ours(".weight"),
            "mixer.layer.step.weight",
            layout=MATRIX,
            widths=(shape.width("value"), *widths, shape.num_heads),
        ),
        rule("mixer.conv1d.weight", *ours("_conv.taps"), layout=TAPS, widths=widths),
        rule("mixer.conv1d.bias", *ours("_conv.bias"), widths=widths),
        rule("mixer.dt_bias", "mixer.layer.step_bias"),
        rule("mixer.A_log", "mixer.layer.log_rate"),
        rule("mixer.D", "mixer.layer.skip"),
        rule("mixer.norm.weight", "mixer.layer.norm.scale"),
        *projections("mixer.", out_proj="output"),
    ]


MAMBA = Architecture(
    model_type="mamba",
    class_name="MambaForCausalLM",
    read=read_mamba,
    write=write_mamba,
    mixers=(Mamba1Config,),
    ffns=(NoneType,),
    needs=(Mamba1Config,),
    rules=_mamba_rules,
    names=NAMES,
)
MAMBA2 = Architecture(
    model_type="mamba2",
    class_name="Mamba2ForCausalLM",
    read=read_mamba2,
    write=write_mamba2,
    mixers=(Mamba2Config,),
    ffns=(NoneType,),
    needs=(Mamba2Config,),
    rules=_mamba2_rules,
    names=NAMES,
)
