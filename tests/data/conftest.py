"""Every test has a cache of its own, and texts small enough to check token by token."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MEMTRAIN_CACHE", str(folder))
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Callable[..., str]:
    """A folder with these files: name=content; names get ".txt" where they have no suffix."""

    def write(folder: str = "texts", **files: str | bytes) -> str:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            (place / f"{name}.txt").write_bytes(data)
        return str(place)

    return write


@pytest.fixture
def books(texts: Callable[..., str]) -> str:
    """Twenty documents of 30 to 600 bytes; every line tells its book and its number."""
    files = {
        f"book{i:02d}": "".join(
            f"{i:02d}:{line:03d} the line\n" for line in range(2 + (7 * i) % 31)
        )
        for i in range(20)
    }
    return texts("books", **files)
