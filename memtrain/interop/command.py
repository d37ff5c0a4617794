"""`memtrain import` and `memtrain export --huggingface`: folders of transformers and ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memtrain.config import Experiment
from memtrain.data.config import DataConfig
from memtrain.data.tokenizer import Tokenizer, load_tokenizer
from memtrain.decode.artifact import check_free
from memtrain.decode.export import export_model
from memtrain.description import DtypeName
from memtrain.errors import BadInput
from memtrain.interop.huggingface import folder as folders
from memtrain.interop.huggingface import load, save
from memtrain.model.parameters import Skeleton, parameters_of


OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def import_model(folder: Path, out: Path, *, dtype: DtypeName | None = None) -> dict[str, Any]:
    """Writes the artifact `out` of a Hugging Face folder, once it decodes as `export_model` asks.

    The tokenizer is the folder's `tokenizer.json`; without any, tokens are numbers and the
    artifact decodes them, and no text. Raises BadInput for what memtrain cannot read.
    """
    check_free(out)
    tokenizer = tokenizer_of(folder)
    config, vocab_size, parameters = load(folder)
    experiment = Experiment(
        name=folder.name,
        model=config,
        data=DataConfig() if tokenizer is None else DataConfig(tokenizer=str(folder)),
    )
    model = Skeleton.of(config, vocab_size).merge(parameters)
    done = export_model(
        model, experiment, tokenizer, out, {"huggingface": folder.name}, dtype=dtype
    )
    return done | {"tokenizer": None if tokenizer is None else tokenizer.vocab_size}


def tokenizer_of(folder: Path) -> Tokenizer | None:
    """Of `tokenizer.json`; None where there is no tokenizer. Raises BadInput for other kinds."""
    if (folder / "tokenizer.json").exists():
        return load_tokenizer(str(folder))
    for name in OTHER_TOKENIZERS:
        if (folder / name).exists():
            raise BadInput(
                f"{folder / name}: memtrain reads a tokenizer.json only: save it as a fast "
                "tokenizer of transformers, or take it away to import the model alone"
            )
    return None


def export_run(run: Path, folder: Path, *, step: int | None = None) -> dict[str, Any]:
    """Writes a run's newest valid checkpoint, or that of `step`, as a Hugging Face folder, with
    its tokenizer where that is a `tokenizer.json`. Raises BadInput, naming the layer, for a model
    that has no counterpart."""
    from memtrain.train.load import load_model

    folders.check_free(folder)
    loaded = load_model(run, step)
    parameters = parameters_of(loaded.model)
    files = {} if loaded.tokenizer is None else loaded.tokenizer.files()
    content = save(folder, loaded.model.config, parameters, files=files)
    return {
        "huggingface": str(folder),
        "created_from": {"run": loaded.experiment.name, "step": loaded.step},
        "model_type": content["model_type"],
        "parameters": sum(a.size for a in parameters.values()),
        "tokenizer": "tokenizer.json" if files else None,
    }
