"""The "stdlib" source: the Python standard library's own files, as text that is always there."""

import re
import sysconfig
from collections import Counter
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import numpy as np


LEFT_OUT_FOLDERS = frozenset(
    {
        "__pycache__",
        "__phello__",
        "_bundled",
        "dist-packages",
        "encodings",
        "idle_test",
        "lib-dynload",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
    }
)
LEFT_OUT_FILES = re.compile(r"_sysconfigdata.*|_sysconfig_vars.*|_build_details.*")
MIN_BYTES = 512
"""Shorter files are mostly `import *`."""
SHINGLE_LINES = 3
MAX_JACCARD = 0.3
"""A file that shares more of its shingles with one before it is left out."""

_HEAD_BYTES = 1000
_GENERATED = re.compile(
    rb"auto(matically)?[ -]?generated|file (is|was) generated|do not edit",
    re.IGNORECASE,
)


def root() -> Path:
    """Where this Python keeps its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def candidates(folder: Path) -> list[str]:
    """Names (relative, sorted) of the .py files under `folder` that may be read, by path alone."""
    names = []
    for parent, folders, files in folder.walk():
        folders[:] = [f for f in folders if f not in LEFT_OUT_FOLDERS and "config-" not in f]
        for name in files:
            if name.endswith(".py") and not LEFT_OUT_FILES.fullmatch(name.removesuffix(".py")):
                names.append((parent / name).relative_to(folder).as_posix())
    return sorted(names)


def choose(files: Mapping[str, Path]) -> dict[str, bytes]:
    """Name -> content of the files that are long, UTF-8, written by hand and not near-copies.

    Near-copies are found by Jaccard index over shingles of 3 lines (Broder 1997); the first by
    name stays.
    """
    contents: dict[str, bytes] = {}
    for name in sorted(files):
        content = files[name].read_bytes()
        if len(content) >= MIN_BYTES and _is_utf8(content) and not _is_generated(content):
            contents[name] = content
    for name in near_copies(contents):
        del contents[name]
    return contents


def near_copies(contents: Mapping[str, bytes]) -> set[str]:
    """Names whose shingles overlap with an earlier one's by more than `MAX_JACCARD`."""
    names = list(contents)
    shingles = [_shingles(content) for content in contents.values()]
    if not any(map(len, shingles)):
        return set()
    owner = np.repeat(np.arange(len(names)), [len(s) for s in shingles])
    value = np.concatenate(shingles)
    order = np.lexsort((owner, value))
    owner, value = owner[order], value[order]
    runs = np.split(owner, np.flatnonzero(np.diff(value)) + 1)
    shared: Counter[tuple[int, int]] = Counter()
    for run in runs:
        if len(run) > 1:
            shared.update(combinations(run.tolist(), 2))
    copies: set[int] = set()
    for (first, second), common in sorted(shared.items()):
        union = len(shingles[first]) + len(shingles[second]) - common
        if first not in copies and common > MAX_JACCARD * union:
            copies.add(second)
    return {names[index] for index in copies}


def _shingles(content: bytes) -> np.ndarray:
    """Distinct hashes of the runs of 3 lines that are not blank, indentation aside."""
    lines = [stripped for line in content.splitlines() if (stripped := line.strip())]
    # Equal lines have equal hashes within this process, and nothing else of them is used.
    hashes = np.fromiter(map(hash, lines), np.int64, len(lines)).view(np.uint64)
    count = len(hashes) - SHINGLE_LINES + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for offset in range(SHINGLE_LINES):
        total = total * np.uint64(0x9E3779B97F4A7C15) + hashes[offset : offset + count]
    return np.unique(total)


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _is_generated(content: bytes) -> bool:
    return _GENERATED.search(content[:_HEAD_BYTES]) is not None
