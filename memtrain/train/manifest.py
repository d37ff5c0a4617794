"""The manifest of a checkpoint: what makes one valid.

`MANIFEST.json` lists every file of a step with its size and sha256, and is written last. Orbax
stores no digest of array data: of 180 single flipped bits in its files, 167 came back as silently
wrong weights. The manifest carries its own digest and has one rendering, byte for byte, so that a
flipped bit in it is seen as well. Nothing here needs JAX.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from memtrain.errors import CheckpointError


FORMAT = 1
FILE_NAME = "MANIFEST.json"
_MAX_BYTES = 64 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


class FileDigest(NamedTuple):
    """Size in bytes and sha256 (hex) of one file."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a step holds and how it was written.

    `files` maps a path relative to the step directory to its digest; `leaves` maps a leaf's name to
    {"shape", "dtype"} and, for PRNG keys, "key_impl"; `topology` records mesh axes, device kind and
    process count for the reader, restore does not need them; `metadata` is the caller's.
    """

    step: int
    files: dict[str, FileDigest]
    leaves: dict[str, dict[str, Any]]
    topology: dict[str, Any]
    versions: dict[str, str]
    metadata: dict[str, Any]
    format: int = FORMAT

    def render(self) -> bytes:
        """The one way to write this manifest, with the sha256 of all the rest inside."""
        content = dataclasses.asdict(self)
        content["files"] = {name: list(digest) for name, digest in self.files.items()}
        content["sha256"] = hashlib.sha256(_dump(content)).hexdigest()
        return _dump(content)


def check_metadata(metadata: dict[str, Any]) -> None:
    """Raise TypeError or ValueError unless JSON gives `metadata` back as it is."""
    if json.loads(json.dumps(metadata, allow_nan=False)) != metadata:
        raise TypeError("checkpoint metadata must survive JSON: string keys, lists and no tuples")


def digest_files(root: Path, names: Iterable[str], *, sync: bool = False) -> dict[str, FileDigest]:
    """Size and sha256 of files under `root`; with `sync`, also flush each to the disk.

    Raises OSError when a file cannot be read, or is not a regular file.
    """

    def digest(name: str) -> FileDigest:
        # O_NOFOLLOW: a link would make the digest speak of a file outside the checkpoint.
        descriptor = os.open(root / name, os.O_RDONLY | os.O_NOFOLLOW)
        with open(descriptor, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(f"{name} is not a regular file")
            if sync:
                os.fsync(descriptor)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return FileDigest(os.fstat(descriptor).st_size, sha256)

    ordered = sorted(names)
    if len(ordered) < 2:
        return {name: digest(name) for name in ordered}
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(ordered, pool.map(digest, ordered), strict=True))


def list_files(root: Path) -> list[str]:
    """Every file under `root`, relative, sorted, without the manifest."""
    return sorted(
        path
        for directory, _, names in os.walk(root)
        for path in (str(PurePosixPath(Path(directory, name).relative_to(root))) for name in names)
        if path != FILE_NAME
    )


def write(directory: Path, manifest: Manifest) -> None:
    """Put the manifest into `directory` atomically and durably: complete, or not there."""
    temporary = directory / f"{FILE_NAME}.writing"
    with open(temporary, "wb") as file:
        file.write(manifest.render())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, directory / FILE_NAME)
    sync_tree(directory)


def sync_tree(root: Path) -> None:
    """Flush the directories under and including `root`, so that the names in them last."""
    for directory, _, _ in os.walk(root):
        sync_directory(Path(directory))


def sync_directory(directory: Path) -> None:
    """Flush one directory: creations and renames in it survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(directory: Path) -> Manifest:
    """The manifest of a step directory; CheckpointError saying why if it is no good."""
    path = directory / FILE_NAME
    if directory.is_symlink():
        raise CheckpointError(f"{directory} is a symbolic link; a step must be a real directory")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
                raise CheckpointError(f"{path} is not a regular file of at most {_MAX_BYTES} bytes")
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no {FILE_NAME}: it was never completed") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    manifest = _parse(path, content)
    if str(manifest.step) != directory.name:
        raise CheckpointError(f"{path} is of step {manifest.step}, not of {directory.name}")
    return manifest


def verify(
    directory: Path,
    manifest: Manifest,
    *,
    share: Callable[[list[str]], list[str]] = lambda names: names,
) -> str | None:
    """Why the files of a step differ from its manifest, in words; None if they do not.

    `share` picks the files that this process checks. Files that the manifest does not name are
    never read on restore, and do not make a step invalid.
    """
    names = share(sorted(manifest.files))
    for name in names:
        try:
            status = os.lstat(directory / name)
            parents = [directory / parent for parent in PurePosixPath(name).parents]
        except OSError as error:
            return f"{name}: {error.strerror}"
        if not stat.S_ISREG(status.st_mode) or any(parent.is_symlink() for parent in parents):
            return f"{name} is not a regular file in its own place"
        if status.st_size != manifest.files[name].size:
            return f"{name} has {status.st_size} bytes instead of {manifest.files[name].size}"
    try:
        found = digest_files(directory, names)
    except OSError as error:
        return f"a file cannot be read: {error}"
    for name in names:
        if found[name] != manifest.files[name]:
            return f"{name} does not have its sha256 any more: the disk or a person changed it"
    return None


def _dump(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def _parse(path: Path, content: bytes) -> Manifest:
    try:
        fields = json.loads(content)
        version = fields["format"]
        fields.pop("sha256")  # rendering computes it again
        if isinstance(version, int) and version > FORMAT:
            raise CheckpointError(
                f"{path} was written by a newer memtrain (format {version}; this one reads "
                f"{FORMAT}): upgrade memtrain"
            )
        fields["files"] = {name: FileDigest(*digest) for name, digest in fields["files"].items()}
        manifest = Manifest(**fields)
        problems = list(_problems(manifest))
        same = manifest.render() == content
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}") from error
    if problems:
        raise CheckpointError(f"{path} is damaged: {problems[0]}")
    if not same:
        raise CheckpointError(f"{path} is damaged: it is not as memtrain wrote it")
    return manifest


def _problems(manifest: Manifest) -> Iterator[str]:
    if type(manifest.step) is not int or manifest.step < 0 or manifest.format != FORMAT:
        yield "step or format is not a natural number"
    for name in ("files", "leaves", "topology", "versions", "metadata"):
        if not isinstance(getattr(manifest, name), dict):
            yield f"{name} is not an object"
            return
    for name, digest in manifest.files.items():
        parts = PurePosixPath(name).parts
        if not parts or name != "/".join(parts) or ".." in parts or name[0] == "/" or "\0" in name:
            yield f"file name {name!r} leaves the checkpoint"
        if type(digest.size) is not int or digest.size < 0:
            yield f"size of {name!r}"
        if not isinstance(digest.sha256, str) or not _SHA256.fullmatch(digest.sha256):
            yield f"sha256 of {name!r}"
    for name, leaf in manifest.leaves.items():
        shape = leaf["shape"]
        if not all(type(size) is int and size >= 0 for size in shape):
            yield f"shape of leaf {name!r}"
        if not isinstance(leaf["dtype"], str) or not isinstance(leaf.get("key_impl", ""), str):
            yield f"dtype of leaf {name!r}"
