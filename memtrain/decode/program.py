"""The model as programs for any platform: `jax.export` of prefill and decode, weights as arguments.

With them an artifact decodes with jax and safetensors alone (`standalone.py`, which goes along).
They are a convenience: jax reads a serialised program for about half a year of releases, while the
weights, the configuration and memtrain go on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from memtrain.memory.attention import AttentionConfig
from memtrain.memory.protocol import Context
from memtrain.model.config import ModelConfig
from memtrain.model.language_model import full_pattern
from memtrain.model.unstacked import Unstacked, abstract_model, tensor_names


PLATFORMS = ("cpu", "cuda", "tpu")
CHUNK = 32
"""Tokens of a row that the prefill program reads."""
CAPACITY = 4096
"""Tokens of a row that the programs' cache holds."""


def export_programs(
    config: ModelConfig, vocab_size: int, *, capacity: int = CAPACITY, chunk: int = CHUNK
) -> dict[str, bytes]:
    """Files of the `program/` folder: init, prefill, step, their description, and a reader.

    init(weights) -> state
    prefill(weights, state, tokens, positions, starts, valid) -> (logits [1, chunk, V], state)
    step: the same for one token.

    weights: {tensor name: array}. state: {"layers.LAYER.PLACE.LEAF": array}, to be donated. tokens
    and positions int32 [1, T], starts and valid bool [1, T]. Batch, capacity and chunk are fixed.
    """
    model = abstract_model(_portable(config), vocab_size)
    names = tensor_names(model)
    leaves, structure = jax.tree.flatten(model)
    weights = dict(zip(names, leaves, strict=True))

    def rebuilt(weights: Mapping[str, Any]) -> Unstacked:
        return jax.tree.unflatten(structure, [weights[name] for name in names])

    def init(weights):
        return _by_name(rebuilt(weights).init_state(1, capacity))

    nested = jax.eval_shape(lambda weights: rebuilt(weights).init_state(1, capacity), weights)
    state, tree = _by_name(nested), jax.tree.structure(nested)
    # Listed in the order of depth; jax sorts the keys of a dict, "10" before "2".
    state_names = list(state)

    def forward(weights, state, tokens, positions, starts, valid):
        model = rebuilt(weights)
        ctx = Context(positions=positions, starts=starts, valid=valid)
        nested = jax.tree.unflatten(tree, [state[name] for name in state_names])
        hidden, nested, _ = model(tokens, nested, ctx)
        assert nested is not None
        return model.body.logits(hidden), _by_name(nested)

    def inputs(length: int) -> list[jax.ShapeDtypeStruct]:
        integers = jax.ShapeDtypeStruct((1, length), jnp.int32)
        flags = jax.ShapeDtypeStruct((1, length), jnp.bool_)
        return [integers, integers, flags, flags]

    exported = {
        "init": jax_export.export(jax.jit(init), platforms=PLATFORMS)(weights),
        "prefill": jax_export.export(jax.jit(forward), platforms=PLATFORMS)(
            weights, state, *inputs(chunk)
        ),
        "step": jax_export.export(jax.jit(forward), platforms=PLATFORMS)(
            weights, state, *inputs(1)
        ),
    }
    about = {
        "batch": 1,
        "capacity": capacity,
        "chunk": chunk,
        "platforms": list(PLATFORMS),
        "jax": jax.__version__,
        "calling_convention": {
            name: program.calling_convention_version for name, program in exported.items()
        },
        "donate": {"prefill": [1], "step": [1]},
        "state_bytes": sum(int(np.prod(s.shape)) * s.dtype.itemsize for s in state.values()),
    }
    standalone = Path(__file__).with_name("standalone.py").read_bytes()
    return {
        **{f"{name}.jaxexport": bytes(program.serialize()) for name, program in exported.items()},
        "program.json": (json.dumps(about, indent=1) + "\n").encode(),
        "decode.py": standalone,
    }


def _by_name(state: list[dict[str, Any]]) -> dict[str, Any]:
    """{"layers.0.mixer.key": array} of the state of every layer, in tree order."""
    return {
        ".".join(
            ["layers", *(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)]
        ): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _portable(config: ModelConfig) -> ModelConfig:
    """The model with attention on the backend that compiles for every platform."""

    def portable(layer: Any) -> Any:
        if isinstance(layer, AttentionConfig):
            return dataclasses.replace(layer, backend="xla")
        return layer

    pattern = tuple(
        dataclasses.replace(block, mixer=portable(block.mixer), ffn=portable(block.ffn))
        for block in full_pattern(config)
    )
    return dataclasses.replace(config, pattern=pattern)
