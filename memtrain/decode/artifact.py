"""`model.mtx`: a model as a folder that decodes, and vouches for every byte in it.

`docs/artifact.md` describes the files. Writing is all or nothing; loading checks the sha256 of
every file, and refuses what is missing, changed, unknown or of another format.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from memtrain.config import Experiment, from_dict, to_dict
from memtrain.data.tokenizer import Tokenizer, load_tokenizer
from memtrain.decode.cache_spec import cache_spec
from memtrain.decode.golden import Golden
from memtrain.errors import ArtifactError, BadInput, StorageFailed
from memtrain.files import folder_beside
from memtrain.model.ablation import memory_names
from memtrain.model.language_model import LanguageModel
from memtrain.model.unstacked import Unstacked, abstract_model, from_tensors, stack_model


FORMAT = "memtrain-artifact"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAX_SHARD_BYTES = 2 << 30

ROLES = {
    "config.json": "config",
    "cache_spec.json": "cache_spec",
    "model.safetensors.index.json": "weights_index",
}
"""Role of a file by its name; those of folders and weights follow from the path."""


def write_artifact(
    out: Path,
    *,
    experiment: Experiment,
    vocab_size: int,
    tensors: Mapping[str, np.ndarray],
    tokenizer: Tokenizer | None,
    golden: Golden,
    created_from: Mapping[str, Any],
    check: Callable[[Artifact], Mapping[str, Any]],
    programs: Mapping[str, bytes] | None = None,
) -> Artifact:
    """Writes an artifact to `out`, all or nothing.

    tensors: parameters by name (`memtrain.model.unstacked`), in the dtypes of `experiment.model`.
    check: is given the artifact as it was loaded back from the disk, raises ArtifactError if it
      does not decode as it should, and returns the numbers that go into the manifest.
    programs: files of the `program/` folder.

    An artifact that is at `out` already is replaced at the end; anything else there is refused.
    Raises BadInput where `out` cannot be used, StorageFailed where the disk refuses.
    """
    out = Path(out)
    check_free(out)
    with _storage(out), folder_beside(out) as folder:
        _write_json(folder / "config.json", to_dict(experiment))
        abstract = abstract_model(experiment.model, vocab_size)
        _write_json(folder / "cache_spec.json", cache_spec(abstract))
        _write_tensors(folder, tensors)
        _write_tokenizer(folder / "tokenizer", tokenizer)
        golden.save(folder / "golden")
        for name, content in (programs or {}).items():
            (folder / "program").mkdir(exist_ok=True)
            (folder / "program" / name).write_bytes(content)
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "created_from": dict(created_from),
            "library": {
                name: importlib.metadata.version(name) for name in ("memtrain", "jax", "flax")
            },
            "model": {
                "vocab_size": vocab_size,
                "parameters": sum(tensor.size for tensor in tensors.values()),
                "dtypes": dataclasses.asdict(experiment.model.dtypes),
            },
            "memories": {
                label: [f"{layer}.{place}" for layer, place in places]
                for label, places in memory_names(experiment.model).items()
            },
            "tokenizer": None
            if tokenizer is None
            else {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint()},
            "checked": None,
            "files": _digests(folder),
        }
        _write_manifest(folder, manifest)
        manifest["checked"] = dict(check(Artifact(folder, _verified(folder))))
        _write_manifest(folder, manifest)
        _sync(folder)
        _move(folder, out)
    return Artifact(out, _read_manifest(out))


@dataclasses.dataclass(frozen=True)
class Artifact:
    """An artifact whose files were all found unchanged."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def load(cls, path: Path | str) -> Artifact:
        """Raises ArtifactError, naming the file, unless every file is what the manifest says."""
        path = Path(path)
        manifest = _verified(path)
        if not manifest["checked"]:
            raise ArtifactError(f"{path}: its export was never finished: export it again")
        return cls(path, manifest)

    @cached_property
    def experiment(self) -> Experiment:
        """The run that the model comes from, with the dtypes of the artifact."""
        file = self.path / "config.json"
        try:
            return from_dict(Experiment, json.loads(file.read_bytes()), source=str(file))
        except BadInput as error:
            raise ArtifactError(str(error)) from None

    @property
    def vocab_size(self) -> int:
        return self.manifest["model"]["vocab_size"]

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """None where tokens are numbers, not text."""
        if self.manifest["tokenizer"] is None:
            return None
        folder = self.path / "tokenizer"
        kind = json.loads((folder / "kind.json").read_bytes())["kind"]
        tokenizer = load_tokenizer("bytes" if kind == "bytes" else str(folder))
        wanted = self.manifest["tokenizer"]["fingerprint"]
        if tokenizer.fingerprint() != wanted:
            raise ArtifactError(
                f"{folder}: the tokenizer is {tokenizer.fingerprint()}, the model's is {wanted}"
            )
        return tokenizer

    def golden(self) -> Golden:
        return Golden.load(self.path / "golden")

    def cache_spec(self) -> dict[str, Any]:
        return json.loads((self.path / "cache_spec.json").read_bytes())

    def tensors(self) -> dict[str, np.ndarray]:
        """Every parameter by name, in host memory."""
        index = json.loads((self.path / "model.safetensors.index.json").read_bytes())
        tensors = {}
        for shard in sorted(set(index["weight_map"].values())):
            with safe_open(self.path / shard, framework="np") as file:
                for name in file.keys():  # noqa: SIM118
                    tensors[name] = file.get_tensor(name)
        if set(tensors) != set(index["weight_map"]):
            raise ArtifactError(f"{self.path}: the weights are not those of their index")
        return tensors

    def weights(self) -> Unstacked:
        """The model layer by layer, as the engine reads it.

        Raises ArtifactError if this version of memtrain builds another model, or another cache,
        from the configuration than the one that wrote the artifact.
        """
        config = self.experiment.model
        try:
            weights = from_tensors(config, self.vocab_size, self.tensors())
        except BadInput as error:
            raise ArtifactError(f"{self.path}: {error}") from None
        if json.loads(json.dumps(cache_spec(weights))) != self.cache_spec():
            raise ArtifactError(
                f"{self.path}: cache_spec.json is not the cache that this memtrain decodes with: "
                f"use memtrain {self.manifest['library']['memtrain']}, or export again"
            )
        return weights

    def stacked_model(self) -> LanguageModel:
        """The model as it is trained, its repeats stacked."""
        return stack_model(self.weights())


def _verified(path: Path) -> dict[str, Any]:
    """The manifest, once every file has been compared with it."""
    manifest = _read_manifest(path)
    found = {str(file.relative_to(path)) for file in path.rglob("*") if not _is_folder(file)}
    files = manifest["files"]
    for name in sorted(found - set(files) - {MANIFEST}):
        raise ArtifactError(f"{path / name} is no part of the artifact: take it away")
    for name in sorted(set(files) - found):
        raise ArtifactError(f"{path / name} is missing")
    for name in files:
        file = path / name
        if file.is_symlink() or not file.is_file():
            raise ArtifactError(f"{file} is not a regular file")
        if file.stat().st_size != files[name]["bytes"]:
            raise ArtifactError(
                f"{file} has {file.stat().st_size} bytes, {files[name]['bytes']} were written"
            )
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, digest in zip(files, pool.map(lambda n: _sha256(path / n), files), strict=True):
            if digest != files[name]["sha256"]:
                raise ArtifactError(f"{path / name} was changed: its sha256 is not the manifest's")
    return manifest


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        content = file.read_bytes()
    except OSError as error:
        what = (
            "is not an exported model" if not path.is_dir() or not file.exists() else error.strerror
        )
        if (path / "config.json").exists() and (path / "checkpoints").is_dir():
            raise ArtifactError(
                f"{path} is a run and not an exported model: make one with "
                f"'memtrain export {path} --out {path / 'model.mtx'}'"
            ) from None
        raise ArtifactError(f"{path} {what}: {MANIFEST} cannot be read") from None
    try:
        manifest = json.loads(content)
        version = manifest["format_version"] if manifest["format"] == FORMAT else None
    except (ValueError, KeyError, TypeError):
        raise ArtifactError(f"{file} is damaged: it is no manifest") from None
    # The digest covers the version too, but a newer format may render it otherwise.
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ArtifactError(
            f"{file} is of format {version}, this memtrain reads {FORMAT_VERSION}: upgrade memtrain"
        )
    if version != FORMAT_VERSION or _rendered(manifest) != content:
        raise ArtifactError(f"{file} was changed: it is not as memtrain wrote it")
    return manifest


def _rendered(manifest: Mapping[str, Any]) -> bytes:
    """The one way to write a manifest, with its own sha256 in it."""
    fields = {key: value for key, value in manifest.items() if key != "sha256"}
    plain = json.dumps(fields, sort_keys=True, indent=1, allow_nan=False)
    digest = hashlib.sha256(plain.encode()).hexdigest()
    text = json.dumps({**fields, "sha256": digest}, sort_keys=True, indent=1, allow_nan=False)
    return (text + "\n").encode()


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    (folder / MANIFEST).write_bytes(_rendered(manifest))


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def _write_tensors(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Shards of at most `MAX_SHARD_BYTES` (a larger tensor has one of its own), and their index."""
    shards: list[list[str]] = []
    room = 0
    for name, tensor in tensors.items():
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(name)
        room -= tensor.nbytes
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # safetensors writes the buffer as it lies in memory.
        save_file({name: np.ascontiguousarray(tensors[name]) for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer | None) -> None:
    folder.mkdir()
    files = {} if tokenizer is None else tokenizer.files()
    kind = "none" if tokenizer is None else "file" if files else "bytes"
    _write_json(folder / "kind.json", {"kind": kind})
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _digests(folder: Path) -> dict[str, Any]:
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST)
    return {
        str(file.relative_to(folder)): {
            "bytes": file.stat().st_size,
            "sha256": _sha256(file),
            "role": _role(str(file.relative_to(folder))),
        }
        for file in files
    }


def _role(name: str) -> str:
    if "/" in name:
        return name.split("/")[0]
    return ROLES.get(name, "weights")


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def check_free(out: Path) -> None:
    """Raises BadInput unless nothing, an empty folder or an artifact of ours is at `out`."""
    if not out.parent.is_dir():
        raise BadInput(f"--out {out}: there is no folder {out.parent}")
    if not os.path.lexists(out) or (_is_folder(out) and not any(out.iterdir())):
        return
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        if _is_folder(out) and json.loads((out / MANIFEST).read_bytes())["format"] == FORMAT:
            return
    raise BadInput(f"--out {out}: is there already and is no artifact: it is not overwritten")


@contextlib.contextmanager
def _storage(out: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageFailed(
            f"{out} could not be written: {reason}; nothing is left behind"
        ) from error


def _sync(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors files come as 0600
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _move(folder: Path, out: Path) -> None:
    """Puts the finished folder in its place. An older artifact goes once the new one is there."""
    if not os.path.lexists(out):
        os.rename(folder, out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent)) / out.name
    os.rename(out, old)
    try:
        os.rename(folder, out)
    except OSError:
        os.rename(old, out)
        raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)
