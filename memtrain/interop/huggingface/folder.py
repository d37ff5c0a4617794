"""A Hugging Face model's folder: `config.json` and safetensors, in one file or in shards."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from memtrain.errors import BadInput, StorageFailed
from memtrain.files import folder_beside


CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 << 30


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `config.json`. Raises BadInput where there is none, or no JSON object."""
    return _read_json(folder / CONFIG, "the folder of a Hugging Face model has one")


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a folder by name; each is read when it is asked for."""

    def __init__(self, folder: Path):
        """Raises BadInput where there are no safetensors, or where a shard is missing."""
        self._open = contextlib.ExitStack()
        if (folder / INDEX).exists():
            index = _read_json(folder / INDEX, "").get("weight_map")
            if not isinstance(index, dict) or not index:
                raise BadInput(f"{folder / INDEX} has no weight_map")
            self._file_of = {str(name): folder / str(file) for name, file in index.items()}
        elif (folder / WEIGHTS).exists():
            self._file_of = {}
        else:
            raise BadInput(
                f"{folder} has neither {WEIGHTS} nor {INDEX}: memtrain reads safetensors only, "
                "which save_pretrained writes"
            )
        files = set(self._file_of.values()) or {folder / WEIGHTS}
        self._files = {file: self._opened(file) for file in sorted(files)}
        found = {name: file for file, opened in self._files.items() for name in opened.keys()}  # noqa: SIM118
        for name, file in self._file_of.items():
            if found.get(name) != file:
                raise BadInput(f"{file} has no tensor {name}, which {INDEX} says it has")
        self._file_of = found

    def _opened(self, file: Path) -> Any:
        try:
            return self._open.enter_context(safe_open(file, framework="np"))
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{file} cannot be read: {error}") from None

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[self._file_of[name]].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    files: Mapping[str, bytes],
) -> None:
    """Writes all, or nothing. Raises BadInput unless nothing, or an empty folder, is there,
    and StorageFailed where the disk refuses."""
    check_free(folder)
    try:
        with folder_beside(folder) as new:
            (new / CONFIG).write_text(json.dumps(config, indent=2, allow_nan=False) + "\n")
            _write_tensors(new, tensors)
            for name, more in files.items():
                (new / name).write_bytes(more)
            if folder.exists():
                folder.rmdir()
            os.rename(new, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageFailed(
            f"{folder} could not be written: {reason}; nothing is left behind"
        ) from error


def check_free(folder: Path) -> None:
    """Raises BadInput unless nothing, or an empty folder, is at `folder`."""
    if not folder.parent.is_dir():
        raise BadInput(f"{folder}: there is no folder {folder.parent}")
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise BadInput(f"{folder} is there already and not empty: it is not overwritten")


def _write_tensors(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    shards: list[list[str]] = [[]]
    room = MAX_SHARD_BYTES
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(name)
        room -= tensor.nbytes
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if shards[1:] else WEIGHTS
        # safetensors writes the buffer as it lies in memory; transformers asks for the format.
        content = {name: np.ascontiguousarray(tensors[name]) for name in names}
        save_file(content, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
        weight_map |= dict.fromkeys(names, file)
    if shards[1:]:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _read_json(file: Path, hint: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        more = f": {hint}" if hint else ""
        raise BadInput(f"{file} cannot be read ({error.strerror}){more}") from None
    except ValueError as error:
        raise BadInput(f"{file} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{file} is no JSON object")
    return content
