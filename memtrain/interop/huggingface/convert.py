"""From a Hugging Face folder to a model's description and parameters, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memtrain.description import Dtypes
from memtrain.errors import BadInput
from memtrain.interop.huggingface.architecture import (
    Architecture,
    Json,
    Plain,
    check_kinds,
    named,
    written_out,
)
from memtrain.interop.huggingface.folder import Tensors, read_config, write_folder
from memtrain.interop.huggingface.jamba import JAMBA
from memtrain.interop.huggingface.keys import Keys
from memtrain.interop.huggingface.mamba import MAMBA, MAMBA2
from memtrain.interop.huggingface.qwen3_next import QWEN3_NEXT
from memtrain.interop.huggingface.tensors import MATRIX, SAME, Layout, Rule, rule
from memtrain.interop.huggingface.transformer import LLAMA, MISTRAL, QWEN3
from memtrain.memory.attention import AttentionConfig
from memtrain.memory.gated_delta import GatedDeltaConfig
from memtrain.memory.mamba1 import Mamba1Config
from memtrain.memory.mamba2 import Mamba2Config
from memtrain.model.config import Block, ModelConfig
from memtrain.model.language_model import full_pattern
from memtrain.model.parameters import Skeleton


ARCHITECTURES: dict[str, Architecture] = {
    a.model_type: a for a in (LLAMA, MISTRAL, QWEN3, MAMBA, MAMBA2, JAMBA, QWEN3_NEXT)
}
"""By `model_type`."""

SHOWN = 12
"""Names of tensors in an error; the rest is counted."""


def load(
    folder: Path | str, *, dtypes: Dtypes | None = None
) -> tuple[ModelConfig, int, dict[str, np.ndarray]]:
    """(model, vocabulary size, parameters by name) of a folder with `config.json` and safetensors.

    dtypes: of the model, float32 unless given; parameters are converted to `dtypes.params`.
    Parameters are named and stacked as those of a run: `Skeleton.of(model, size).merge(parameters)`
    is the model.

    Raises BadInput for an architecture, a config key or a tensor that is not known, for tensors
    that are missing or of another shape, and for files that cannot be read.
    """
    folder = Path(folder)
    architecture, plain = _read(read_config(folder), str(folder / "config.json"))
    config = plain.config(dtypes=dtypes or Dtypes())
    with Tensors(folder) as tensors:
        parameters = _parameters(architecture, plain, config, tensors, str(folder))
    return config, plain.vocab_size, parameters


def config_from_huggingface(
    content: Mapping[str, Any], source: str = "config.json"
) -> tuple[ModelConfig, int]:
    """(model, vocabulary size) that a `config.json` describes. See `load` for errors."""
    _, plain = _read(content, source)
    return plain.config(), plain.vocab_size


def save(
    folder: Path | str,
    config: ModelConfig,
    parameters: Mapping[str, Any],
    *,
    architecture: str | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Json:
    """Writes a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads, and returns
    its config.

    parameters: by name, as `load` gives them; they are written in their own dtype.
    architecture: a `model_type`, where the layers alone do not say it as they should.
    files: more files by name, a tokenizer's.

    Raises BadInput, naming the layer, for a model that has no counterpart, and where the folder
    is not empty; StorageFailed where the disk refuses.
    """
    vocab_size = parameters["embedding"].shape[0]
    content = config_to_huggingface(config, vocab_size, architecture=architecture)
    chosen = ARCHITECTURES[content["model_type"]]
    tensors = _tensors(chosen, config, vocab_size, parameters)
    content |= {"dtype": str(np.dtype(parameters["embedding"].dtype))}
    write_folder(Path(folder), content, tensors, files or {})
    return content


def config_to_huggingface(
    config: ModelConfig, vocab_size: int, *, architecture: str | None = None
) -> Json:
    """The `config.json` of a model. See `save` for errors."""
    blocks = full_pattern(config) * config.repeats
    plain = Plain(
        dim=config.dim,
        vocab_size=vocab_size,
        norm_epsilon=config.norm_epsilon,
        tied_embeddings=config.tied_embeddings,
        blocks=tuple(written_out(block, config.dim) for block in blocks),
    )
    chosen = _known(architecture) if architecture else _architecture_of(plain)
    check_kinds(chosen, blocks)
    content = {"model_type": chosen.model_type, "architectures": [chosen.class_name]}
    content |= chosen.write(plain)
    _, again = _read(content, f"the {chosen.model_type} of this model")
    for index, pair in enumerate(zip(plain.blocks, again.blocks, strict=True)):
        _compare(index, *pair, plain.dim, chosen.model_type)
    return content


def _known(model_type: Any) -> Architecture:
    if model_type not in ARCHITECTURES:
        raise BadInput(
            f"model_type={model_type!r} is not known: there are {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[model_type]


def _read(content: Mapping[str, Any], source: str) -> tuple[Architecture, Plain]:
    try:
        architecture = _known(content.get("model_type"))
        keys = Keys(content, source)
        plain = architecture.read(keys)
        keys.done()
    except BadInput as error:
        line = str(error)
        raise BadInput(line if line.startswith(source) else f"{source}: {line}") from None
    except ValueError as error:  # of a layer's description
        raise BadInput(f"{source}: {error}") from None
    return architecture, plain


def _architecture_of(plain: Plain) -> Architecture:
    """The one that has layers of these kinds, if any."""
    mixers = {type(block.mixer) for block in plain.blocks}
    known = (AttentionConfig, GatedDeltaConfig, Mamba1Config, Mamba2Config)
    for index, block in enumerate(plain.blocks):
        if type(block.mixer) not in known:
            raise BadInput(
                f"layer {index}, mixer: {named(type(block.mixer))} has no counterpart in the "
                f"architectures {', '.join(ARCHITECTURES)}"
            )
    if mixers == {AttentionConfig}:
        attention = [block.mixer for block in plain.blocks]
        if any(isinstance(a, AttentionConfig) and a.qk_norm for a in attention):
            return QWEN3
        windows = {a.window for a in attention if isinstance(a, AttentionConfig)}
        return LLAMA if windows == {None} else MISTRAL
    if mixers == {Mamba2Config}:
        return MAMBA2
    if mixers == {Mamba1Config}:
        return MAMBA
    if mixers <= {Mamba1Config, AttentionConfig} and AttentionConfig in mixers:
        return JAMBA
    if mixers <= {GatedDeltaConfig, AttentionConfig}:
        return QWEN3_NEXT
    names = " and ".join(sorted(map(named, mixers)))
    raise BadInput(f"no architecture of transformers that memtrain knows has layers of {names}")


def _compare(index: int, ours: Block, theirs: Block, dim: int, model_type: str) -> None:
    """Raises BadInput for the first thing that their config could not say of a layer of ours."""
    theirs = written_out(theirs, dim)
    for place in ("mixer", "ffn"):
        mine, other = getattr(ours, place), getattr(theirs, place)
        if mine == other:
            continue
        kind = named(type(mine))
        if type(mine) is not type(other):
            raise BadInput(
                f"layer {index}, {place}: {kind} has no counterpart in {model_type}, which would "
                f"have {named(type(other))} there"
            )
        for field in dataclasses.fields(mine):
            a, b = getattr(mine, field.name), getattr(other, field.name)
            if a != b:
                raise BadInput(
                    f"layer {index}, {place}: {kind} with {field.name}={a!r} has no counterpart "
                    f"in {model_type}, whose layer here would have {b!r}"
                )


def _outer_rules(architecture: Architecture, config: ModelConfig) -> list[Rule]:
    """Of the tensors outside the layers. A model of ours may multiply its embeddings as it reads
    them: theirs hold the product, and where they are the head too, the final norm makes up for it.
    """
    names, scale = architecture.names, config.embedding_scale or config.dim**0.5
    norm = architecture.norm
    times = lambda by: Layout(lambda a: _scaled(a, 1 / by), lambda a: _scaled(a, by))  # noqa: E731
    if config.tied_embeddings and scale != 1:
        inner, outer = times(1 / scale), norm
        norm = Layout(lambda a: inner.read(outer.read(a)), lambda a: outer.write(inner.write(a)))
    rules = [
        rule(names.embedding, "embedding", layout=times(scale) if scale != 1 else SAME),
        rule(names.final_norm, "final_norm.scale", layout=norm),
    ]
    if not config.tied_embeddings:
        rules.append(rule(names.unembedding, "unembedding.weight", layout=MATRIX))
    return rules


def _scaled(a: np.ndarray, by: float) -> np.ndarray:
    return (a.astype(np.float32) * np.float32(by)).astype(a.dtype)


def _layer_rules(
    architecture: Architecture, config: ModelConfig
) -> Iterable[tuple[str, str, int, list[Rule]]]:
    """Of each layer: (prefix of theirs, prefix of ours, repeat, rules)."""
    pattern = [written_out(block, config.dim) for block in full_pattern(config)]
    for layer in range(len(pattern) * config.repeats):
        repeat, column = divmod(layer, len(pattern))
        prefix = architecture.names.layer.format(layer)
        yield prefix, f"blocks.{column}.", repeat, architecture.rules(pattern[column], config.dim)


def _parameters(
    architecture: Architecture,
    plain: Plain,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    source: str,
) -> dict[str, np.ndarray]:
    """Parameters by name, of tensors that are exactly those that the architecture has."""
    shapes = Skeleton.of(config, plain.vocab_size).shapes
    outer = _outer_rules(architecture, config)
    layers = list(_layer_rules(architecture, config))
    wanted = [name for r in outer for name in r.theirs]
    wanted += [prefix + name for prefix, _, _, rules in layers for r in rules for name in r.theirs]
    _check_names(wanted, list(tensors), architecture, plain, source)
    dtype = jnp.dtype(config.dtypes.params)
    made: dict[str, np.ndarray] = {}

    def fill(r: Rule, theirs: str, ours: str, repeat: int | None) -> None:
        names = [theirs + name for name in r.theirs]
        targets = [shapes[ours + name] for name in r.ours]
        want = [t.shape if repeat is None else t.shape[1:] for t in targets]
        arrays = [_floating(tensors[name], name, source) for name in names]
        # Strides of zero: only shapes matter, and little is made of them.
        expected = r.write([np.broadcast_to(np.float32(0), shape) for shape in want])
        for name, array, other in zip(names, arrays, expected, strict=True):
            if array.shape != other.shape:
                raise BadInput(
                    f"{source}: tensor {name} is {list(array.shape)}, the config asks for "
                    f"{list(other.shape)}"
                )
        for name, target, array in zip(r.ours, targets, r.read(arrays), strict=True):
            if repeat is None:
                made[ours + name] = np.ascontiguousarray(array.astype(dtype))
            else:
                if ours + name not in made:
                    made[ours + name] = np.empty(target.shape, dtype)
                made[ours + name][repeat] = array

    for r in outer:
        fill(r, "", "", None)
    for theirs, ours, repeat, rules in layers:
        for r in rules:
            fill(r, theirs, ours, repeat)
    assert set(made) == set(shapes), set(made) ^ set(shapes)
    return {name: made[name] for name in shapes}


def _floating(array: np.ndarray, name: str, source: str) -> np.ndarray:
    """In float32, where sums with it are exact enough. Raises BadInput for what was quantised."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise BadInput(f"{source}: tensor {name} is {array.dtype}: memtrain reads floating point")
    return array.astype(np.float32) if array.dtype.itemsize < 4 else array


def _check_names(
    wanted: list[str], found: list[str], architecture: Architecture, plain: Plain, source: str
) -> None:
    """Raises BadInput, naming them, for tensors that are missing or left over."""
    extra = {name for name in found if not name.startswith(architecture.ignored or ("\0",))}
    extra = {name for name in extra if not name.endswith("rotary_emb.inv_freq")}  # computed
    if plain.tied_embeddings:
        extra.discard(architecture.names.unembedding)  # a copy, which older checkpoints have
    missing, extra = [n for n in wanted if n not in extra], extra - set(wanted)
    said = [
        f"{what} {_listed(names)}"
        for what, names in (("missing", missing), ("left over", sorted(extra)))
        if names
    ]
    if said:
        raise BadInput(
            f"{source}: the tensors are not those of a {architecture.model_type} as config.json "
            f"describes it: {'; '.join(said)}"
        )


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest


def _tensors(
    architecture: Architecture,
    config: ModelConfig,
    vocab_size: int,
    parameters: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """Their tensors by name, of parameters that are exactly the model's."""
    shapes = Skeleton.of(config, vocab_size).shapes
    if set(shapes) != set(parameters):
        odd = sorted(set(shapes) ^ set(parameters))
        raise BadInput(f"the parameters are not those of the model: {_listed(odd)}")
    host = {name: np.asarray(jax.device_get(parameters[name])) for name in shapes}
    for name, array in host.items():
        if array.shape != shapes[name].shape:
            raise BadInput(
                f"parameter {name} is {list(array.shape)}, the model's {list(shapes[name].shape)}"
            )
    made: dict[str, np.ndarray] = {}
    for r in _outer_rules(architecture, config):
        made |= zip(r.theirs, r.write([host[name] for name in r.ours]), strict=True)
    for theirs, ours, repeat, rules in _layer_rules(architecture, config):
        for r in rules:
            written = r.write([host[ours + name][repeat] for name in r.ours])
            made |= zip((theirs + name for name in r.theirs), written, strict=True)
    return made
