"""Small files appear whole or not at all, also on a full disk."""

import errno
from pathlib import Path

import pytest

from memtrain.files import write_whole


def test_it_replaces_what_was_there(tmp_path: Path):
    path = tmp_path / "a.json"
    write_whole(path, "old\n")
    write_whole(path, b"new\n")
    assert path.read_text() == "new\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fails", ["write_bytes", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch, fails: str):
    path = tmp_path / "a.json"
    write_whole(path, "old\n")

    def full(self: Path, *_: object) -> None:
        if fails == "write_bytes":
            with self.open("wb") as file:  # half of it fits
                file.write(b"ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    target = (Path, "write_bytes") if fails == "write_bytes" else ("os.replace",)
    monkeypatch.setattr(*target, full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new\n")
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]
