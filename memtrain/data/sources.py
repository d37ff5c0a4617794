"""Which files a run reads, and the documents in them, one at a time."""

import glob
import gzip
import json
import logging
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from memtrain.data import stdlib
from memtrain.errors import BadInput


logger = logging.getLogger(__name__)

_OPENERS = {".gz": gzip.open, ".xz": lzma.open}
_SNIFFED_BYTES = 8192
_RECORDS_AT_ONCE = 256


class Document(NamedTuple):
    """One text, with the name it is shown under."""

    name: str
    content: bytes


@dataclass(frozen=True)
class SourceFile:
    """One file to read, or one of the candidates of the "stdlib" source."""

    path: Path
    name: str
    """Path relative to the folder or glob it was found by."""
    from_folder: bool = False
    """Found by walking a folder, not asked for by name: left out if it is not text."""
    from_stdlib: bool = False


def find_files(paths: Sequence[str]) -> list[SourceFile]:
    """The files that `data.path` means: in the order given, each part sorted by name, none twice.

    Raises:
        BadInput: a path that does not exist, a glob or folder without a file.
    """
    if not paths:
        raise BadInput('data.path is empty; give files, globs, folders or "stdlib"')
    found: dict[str, SourceFile] = {}
    for path in paths:
        for file in _find(path):
            found.setdefault(str(file.path.resolve()), file)
    return list(found.values())


def _find(path: str) -> list[SourceFile]:
    if path == "stdlib":
        root = stdlib.root()
        names = stdlib.candidates(root)
        if not names:
            raise BadInput(
                f'data.path="stdlib": this Python has no source files in {root};'
                " give files, globs or folders"
            )
        return [SourceFile(root / name, name, from_stdlib=True) for name in names]
    place = Path(path).expanduser()
    if place.is_file():
        return [SourceFile(place, place.name)]
    if place.is_dir():
        files = _walk(place)
        if not files:
            raise BadInput(f"data.path={path!r}: the folder holds no files")
        return files
    if glob.has_magic(path):
        return _match(path, str(place))
    raise BadInput(f'data.path={path!r}: no such file or folder; "stdlib" needs no file')


def _walk(folder: Path) -> list[SourceFile]:
    files = []
    for parent, folders, names in folder.walk():
        folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__"]
        for name in names:
            file = parent / name
            if not name.startswith(".") and file.is_file():
                relative = file.relative_to(folder).as_posix()
                files.append(SourceFile(file, relative, from_folder=True))
    return sorted(files, key=lambda file: file.name)


def _match(path: str, pattern: str) -> list[SourceFile]:
    matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
    root = Path(*_fixed_parts(pattern))
    files = [
        SourceFile(match, match.relative_to(root).as_posix())
        for match in matches
        if match.is_file()
    ]
    if not files:
        raise BadInput(f"data.path={path!r}: the glob matches no file")
    return sorted(files, key=lambda file: file.name)


def _fixed_parts(pattern: str) -> list[str]:
    parts = []
    for part in Path(pattern).parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return parts


def read_documents(files: Iterable[SourceFile], text_field: str) -> Iterator[Document]:
    """The documents of the files in order; empty ones are left out.

    A file is a document; a line of .jsonl and a record of .array_record is one too. `.gz` and
    `.xz` are unpacked. Candidates of "stdlib" are chosen among by their content.

    Raises:
        BadInput: a file that cannot be read or unpacked, a line or record without `text_field`.
    """
    try:
        yield from _read(list(files), text_field)
    except OSError as error:
        raise BadInput(f"{error.filename} cannot be read: {error.strerror or error}") from None


def _read(files: list[SourceFile], text_field: str) -> Iterator[Document]:
    kept = stdlib.choose({f.name: f.path for f in files if f.from_stdlib})
    not_text: list[str] = []
    for file in files:
        if file.from_stdlib:
            if file.name in kept:
                yield Document(file.name, kept.pop(file.name))
            continue
        if file.from_folder and _is_binary(file.path):
            not_text.append(file.name)
            continue
        for document in _read_file(file, text_field):
            if document.content:
                yield document
    if not_text:
        logger.warning(
            "left out %d files that are not text (they hold NUL bytes), such as %s",
            len(not_text),
            not_text[0],
        )


def _suffix(path: Path) -> str:
    inner = Path(path.stem) if path.suffix in _OPENERS else path
    return inner.suffix


def _is_binary(path: Path) -> bool:
    if path.suffix in _OPENERS or path.suffix == ".array_record":
        return False
    with path.open("rb") as file:
        return b"\0" in file.read(_SNIFFED_BYTES)


def _read_file(file: SourceFile, text_field: str) -> Iterator[Document]:
    opener: Any = _OPENERS.get(file.path.suffix, open)
    try:
        if _suffix(file.path) == ".array_record":
            yield from _read_array_record(file, text_field)
        elif _suffix(file.path) == ".jsonl":
            with opener(file.path, "rb") as stream:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        where = f"{file.path}:{number}"
                        content = _json_text(_parse_json(line, where), text_field, where)
                        yield Document(f"{file.name}:{number}", content)
        else:
            with opener(file.path, "rb") as stream:
                yield Document(file.name, stream.read())
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise BadInput(f"{file.path} is damaged or no {file.path.suffix} file: {error}") from None


def _parse_json(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{where} is not JSON: {error}") from None


def _json_text(record: Any, text_field: str, where: str) -> bytes:
    if not isinstance(record, dict) or text_field not in record:
        has = f"it has {sorted(record)}" if isinstance(record, dict) else "it is no JSON object"
        raise BadInput(f"{where} has no field {text_field!r} ({has}); set data.text_field")
    text = record[text_field]
    if not isinstance(text, str):
        raise BadInput(f"{where}: the field {text_field!r} is {type(text).__name__}, not a string")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadInput(f"{where}: {text_field!r} holds half a character: {error}") from None


def _read_array_record(file: SourceFile, text_field: str) -> Iterator[Document]:
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError:
        raise BadInput(
            f"{file.path} needs the `arrayrecord` extra: pip install 'memtrain[arrayrecord]'"
        ) from None
    reader = ArrayRecordReader(str(file.path))
    try:
        # A file cut short opens without a word, as one that is empty; only closing it complains.
        count = reader.num_records()
        for begin in range(0, count, _RECORDS_AT_ONCE):
            end = min(begin + _RECORDS_AT_ONCE, count)
            for index, record in enumerate(reader.read(begin, end), start=begin):
                where = f"{file.path}: record {index}"
                if record.lstrip()[:1] == b"{":
                    record = _json_text(_parse_json(record, where), text_field, where)
                yield Document(f"{file.name}:{index}", record)
        reader.close()
    except RuntimeError as error:
        raise BadInput(f"{file.path} is damaged or no ArrayRecord file: {error}") from None
    if count == 0:
        raise BadInput(f"{file.path} holds 0 records: it is empty or was cut short")
