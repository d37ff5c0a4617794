"""From a run to an artifact that was seen to decode as it was trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memtrain.config import Experiment
from memtrain.data.tokenizer import Tokenizer
from memtrain.decode import artifact as artifacts
from memtrain.decode.artifact import Artifact, write_artifact
from memtrain.decode.golden import Golden, golden_prompts, kept_positions, training_logits
from memtrain.decode.parity import exact_parity, kl_parity, program_parity
from memtrain.decode.program import export_programs
from memtrain.description import DtypeName, Dtypes
from memtrain.errors import BadInput
from memtrain.model.config import ModelConfig
from memtrain.model.language_model import LanguageModel
from memtrain.model.unstacked import from_tensors, stack_model, to_tensors, unstack_model


FLOAT32 = Dtypes()


def export(
    run: Path,
    out: Path,
    *,
    step: int | None = None,
    dtype: DtypeName | None = None,
    programs: bool = True,
) -> dict[str, Any]:
    """Exports a run's newest valid checkpoint, or that of `step`. See `export_model`."""
    from memtrain.train.load import load_model

    artifacts.check_free(Path(out))
    loaded = load_model(Path(run), step)
    return export_model(
        loaded.model,
        loaded.experiment,
        loaded.tokenizer,
        out,
        {"run": loaded.experiment.name, "step": loaded.step},
        dtype=dtype,
        programs=programs,
    )


def export_model(
    model: LanguageModel,
    experiment: Experiment,
    tokenizer: Tokenizer | None,
    out: Path,
    created_from: Mapping[str, Any],
    *,
    dtype: DtypeName | None = None,
    programs: bool = True,
) -> dict[str, Any]:
    """Writes `out`, an artifact that decodes to the model's training logits, or nothing at all.

    dtype: "float32" makes every dtype float32; "bfloat16" stores parameters and multiplies in
      bfloat16 (activations, sums and caches stay as the run has them); None keeps the run's.
    programs: also write the `jax.export` program that decodes without memtrain.

    What is loaded back from the disk is checked: in float32 every logit to 1e-4, decoded in one
    shot, chunked and token by token; in other dtypes also a mean KL of at most 1e-3.
    Raises ArtifactError with the numbers where the check fails.
    """
    artifacts.check_free(Path(out))
    with jax.default_device(_cpu()):
        return _export(model, experiment, tokenizer, Path(out), created_from, dtype, programs)


def _export(model, experiment, tokenizer, out, created_from, dtype, programs) -> dict[str, Any]:
    vocab_size = model.vocab_size
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise BadInput(f"the tokenizer has {tokenizer.vocab_size} ids, the model only {vocab_size}")
    original = to_tensors(unstack_model(model))
    config = dataclasses.replace(model.config, dtypes=_dtypes(model.config.dtypes, dtype))
    experiment = dataclasses.replace(experiment, model=config)

    tokens, starts = golden_prompts(config, vocab_size, tokenizer)
    trained = from_tensors(_in_float32(config), vocab_size, _cast(original, FLOAT32))
    with jax.default_matmul_precision("highest"):
        reference, _ = training_logits(stack_model(trained), tokens, starts)
    at = kept_positions(tokens.shape[1], vocab_size, tokens.shape[0])
    golden = Golden(tokens, starts, at, reference[:, at])

    tensors = _cast(original, config.dtypes)
    same = config.dtypes.params == "float32" and model.config.dtypes.params == "float32"

    def check(artifact: Artifact) -> dict[str, Any]:
        weights = artifact.weights()
        in_float32 = weights
        if config.dtypes != FLOAT32:
            upcast = _cast(artifact.tensors(), FLOAT32)
            in_float32 = from_tensors(_in_float32(config), vocab_size, upcast)
        found = {"float32": exact_parity(in_float32, tokens, starts, reference if same else None)}
        if config.dtypes != FLOAT32:
            found["as_stored"] = kl_parity(weights, tokens, starts, reference)
        if programs:
            found["program"] = program_parity(artifact.path)
        return found

    written = write_artifact(
        out,
        experiment=experiment,
        vocab_size=vocab_size,
        tensors=tensors,
        tokenizer=tokenizer,
        golden=golden,
        created_from=created_from,
        check=check,
        programs=export_programs(config, vocab_size) if programs else None,
    )
    files = written.manifest["files"]
    return {
        "artifact": str(out),
        "created_from": dict(created_from),
        "parameters": written.manifest["model"]["parameters"],
        "bytes": sum(file["bytes"] for file in files.values()),
        "dtypes": written.manifest["model"]["dtypes"],
        "checked": written.manifest["checked"],
    }


def _cpu() -> Any:
    """The host, whose float32 products are float32; None, the default, where jax was told to see
    accelerators only."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def _dtypes(trained: Dtypes, dtype: DtypeName | None) -> Dtypes:
    if dtype is None:
        return trained
    if dtype == "float32":
        return FLOAT32
    if dtype == "bfloat16":
        return dataclasses.replace(trained, params="bfloat16", tables=None, matmul="bfloat16")
    raise BadInput(f"--dtype {dtype}: an artifact is float32 or bfloat16")


def _in_float32(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, dtypes=FLOAT32)


def _cast(tensors: Mapping[str, np.ndarray], dtypes: Dtypes) -> dict[str, np.ndarray]:
    def dtype(name: str) -> Any:
        return jnp.dtype(dtypes.of_tables if name.startswith("tables.") else dtypes.params)

    return {
        name: t.astype(dtype(name)) if jnp.issubdtype(t.dtype, jnp.floating) else t
        for name, t in tensors.items()
    }
