"""The tokens of all documents as one memory-mapped array, built once into a cache folder."""

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from memtrain.data.sources import Document, SourceFile, find_files, read_documents
from memtrain.data.tokenizer import Tokenizer
from memtrain.errors import BadInput, StorageFailed


FORMAT = 1
"""Raised when the files below, or what is read into them, change."""

_RACY_NS = 2_000_000_000
"""A file changed this shortly before it was read may change again under the same time stamp."""

type Split = Literal["train", "validation"]


class Documents(NamedTuple):
    """Some documents of a corpus: spans of `tokens`, in the corpus's own order."""

    tokens: np.ndarray
    """[N] ids of the whole corpus, memory-mapped."""
    begins: np.ndarray
    """[D] int64 first token of each document."""
    ends: np.ndarray
    """[D] int64 one past the last."""

    @property
    def num_tokens(self) -> int:
        return int((self.ends - self.begins).sum())


class Corpus:
    """All documents of a run, tokenized. Opens what `build_corpus` wrote."""

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        self.digest: str = meta["digest"]
        """Of the content of every document, in order. Not of names or places."""
        self.names: list[str] = json.loads((folder / "names.json").read_text())
        self._offsets = np.load(folder / "offsets.npy", allow_pickle=False)
        self._num_bytes = np.load(folder / "num_bytes.npy", allow_pickle=False)
        self._hashes = np.load(folder / "hashes.npy", allow_pickle=False)
        self.tokens: np.ndarray = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
        if len(self.tokens) != meta["num_tokens"] or len(self.names) != meta["num_documents"]:
            raise ValueError("the cached files have another length than was written")

    def split(
        self, split: Split, fraction: float, *, joined: bool = False
    ) -> tuple[np.ndarray, Documents]:
        """Ids and spans of the documents of one side, `fraction` of them held out by content hash.

        Equal documents are on the same side. Should the hash leave a side empty, the document
        with the lowest or highest hash moves over; of a corpus of one document the last part is
        held out. joined: the whole corpus is one document, which has the id of the first.
        """
        if joined:
            cut = round(len(self.tokens) * (1 - fraction))
            spans = (0, cut) if split == "train" else (cut, len(self.tokens))
            begin, end = (np.array([x], np.int64) for x in spans)
            ids = np.arange(1 if begin[0] < end[0] else 0)
            return ids, Documents(self.tokens, begin[ids], end[ids])
        ids = np.arange(len(self.names))
        begins, ends = self._offsets[:-1], self._offsets[1:]
        if fraction == 0:
            ids = ids if split == "train" else ids[:0]
            return ids, Documents(self.tokens, begins[ids], ends[ids])
        distinct = np.unique(self._hashes)
        if len(distinct) == 1:
            lengths = ends - begins
            cuts = ends - np.clip(np.round(lengths * fraction).astype(np.int64), 1, lengths - 1)
            if split == "train":
                return ids, Documents(self.tokens, begins, cuts)
            return ids[:1], Documents(self.tokens, cuts[:1], ends[:1])
        limit = np.uint64(round(fraction * 2**64))
        # Of the distinct hashes at least one stays on either side.
        limit = np.clip(limit, distinct[0] + np.uint64(1), distinct[-1])
        held_out = self._hashes < limit
        ids = ids[held_out if split == "validation" else ~held_out]
        return ids, Documents(self.tokens, begins[ids], ends[ids])

    def bytes_per_token(self, ids: np.ndarray) -> float:
        """Bytes of text that a token stands for, on average over documents `ids`."""
        lengths = self._offsets[1:] - self._offsets[:-1]
        return float(self._num_bytes[ids].sum() / lengths[ids].sum())


def cache_folder() -> Path:
    """MEMTRAIN_CACHE, or memtrain's folder in the user's cache (XDG base directories)."""
    if chosen := os.environ.get("MEMTRAIN_CACHE"):
        return Path(chosen).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "memtrain"


def build_corpus(paths: tuple[str, ...], tokenizer: Tokenizer, *, text_field: str) -> Corpus:
    """Open the corpus of these paths, reading and tokenizing them if that was not done before.

    The cache is keyed by the content and the tokenizer; a note of every file's size and time of
    change spares reading them all to find the key. Any number of processes may do this at once.

    Raises:
        BadInput: see `find_files` and `read_documents`; no text at all; not UTF-8 under a text
            tokenizer.
        StorageFailed: the cache folder cannot be written.
    """
    files = find_files(paths)
    folder = cache_folder() / "corpora"
    stamp = _stamp(files, tokenizer, text_field)
    note = folder / f"files-{stamp}.json"
    corpus = _open_noted(note, folder)
    if corpus is not None:
        return corpus
    with _storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        work = Path(tempfile.mkdtemp(prefix="tmp-", dir=folder))
    try:
        began = time.time_ns()
        key = _write(work, read_documents(files, text_field), tokenizer, paths)
        with _storage_errors(folder):
            _move(work, folder / key)
            # Only what was at rest before we read it may be found by its time stamp again.
            if _newest_change(files) < began - _RACY_NS and stamp == _stamp(
                files, tokenizer, text_field
            ):
                _write_atomically(note, json.dumps({"key": key}))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Corpus(folder / key)


def _open_noted(note: Path, folder: Path) -> Corpus | None:
    try:
        return Corpus(folder / json.loads(note.read_text())["key"])
    except (OSError, ValueError, KeyError):  # never built, cleaned away or damaged: build it
        return None


def _write(
    work: Path, documents: Iterable[Document], tokenizer: Tokenizer, paths: tuple[str, ...]
) -> str:
    """Write the files of a corpus into `work`; returns its key."""
    names, offsets, num_bytes, hashes = [], [0], [], []
    digest = hashlib.sha256()
    with _storage_errors(work), (work / "tokens.bin").open("wb") as out:
        for document in documents:
            ids = _encode(document, tokenizer)
            content_hash = hashlib.blake2b(document.content, digest_size=32).digest()
            digest.update(content_hash)
            if not len(ids):
                continue
            out.write(ids.astype(tokenizer.token_dtype).tobytes())
            names.append(document.name)
            offsets.append(offsets[-1] + len(ids))
            num_bytes.append(len(document.content))
            hashes.append(int.from_bytes(content_hash[:8], "little"))
        if not names:
            raise BadInput(
                f"data.path={','.join(paths)!r} holds no text: every file is empty or binary"
            )
        meta = {
            "format": FORMAT,
            "digest": digest.hexdigest(),
            "tokenizer": tokenizer.fingerprint(),
            "dtype": str(tokenizer.token_dtype),
            "num_tokens": offsets[-1],
            "num_documents": len(names),
        }
        np.save(work / "offsets.npy", np.array(offsets, np.int64))
        np.save(work / "num_bytes.npy", np.array(num_bytes, np.int64))
        np.save(work / "hashes.npy", np.array(hashes, np.uint64))
        (work / "names.json").write_text(json.dumps(names))
        (work / "meta.json").write_text(json.dumps(meta))
    # Names are part of the key, for two corpora of one content must not show each other's.
    return hashlib.sha256(json.dumps([meta, names]).encode()).hexdigest()[:32]


def _encode(document: Document, tokenizer: Tokenizer) -> np.ndarray:
    try:
        return tokenizer.encode(document.content)
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{document.name} is not UTF-8 at byte {error.start}, which"
            f' data.tokenizer={tokenizer.name!r} needs; "bytes" reads any file'
        ) from None


def _stamp(files: list[SourceFile], tokenizer: Tokenizer, text_field: str) -> str:
    entries: list[Any] = [FORMAT, sys.version, tokenizer.fingerprint(), text_field]
    for file in files:
        info = file.path.stat()
        place = str(file.path.resolve())
        entries.append([place, file.name, file.from_stdlib, info.st_size, *_changed(info)])
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:32]


def _changed(info: os.stat_result) -> tuple[int, int]:
    return info.st_mtime_ns, info.st_ctime_ns


def _newest_change(files: list[SourceFile]) -> int:
    return max(max(_changed(file.path.stat())) for file in files)


def _move(work: Path, final: Path) -> None:
    """Put a finished folder in its place, unless a good one is there already."""
    try:
        work.rename(final)
        return
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    try:
        Corpus(final)
    except (OSError, ValueError, KeyError):
        # A damaged one: put it aside under a name nobody looks for, then take its place.
        aside = final.with_name(f"{work.name}-damaged")
        final.rename(aside)
        work.rename(final)
        shutil.rmtree(aside, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed left behind a day ago or earlier."""
    for left in folder.glob("tmp-*"):
        with suppress(FileNotFoundError):  # its owner has just finished
            if left.stat().st_mtime > time.time() - 86400:
                continue
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()


def _write_atomically(file: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(prefix="tmp-", dir=file.parent)
    with os.fdopen(handle, "w") as out:
        out.write(text)
    Path(name).rename(file)


@contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageFailed(
            f"the cache {folder} cannot be written: {error.strerror or error};"
            " MEMTRAIN_CACHE names another folder"
        ) from error
