import gzip
import json
import logging
import lzma
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from memtrain.data.sources import find_files, read_documents
from memtrain.errors import BadInput


def read(*paths: str | Path, text_field: str = "text") -> list[tuple[str, bytes]]:
    return [
        (d.name, d.content) for d in read_documents(find_files([str(p) for p in paths]), text_field)
    ]


def write_records(file: Path, records: list[bytes]) -> None:
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def refused(*paths: str | Path) -> str:
    with pytest.raises(BadInput) as raised:
        read(*paths)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    files = {
        "b.txt": b"bee",
        "a/z.md": b"zed",
        "a/deep/y.txt": b"why",
        "empty.txt": b"",
        "picture.png": b"\x89PNG\0\0",
        ".hidden": b"no",
        ".git/config": b"no",
        "__pycache__/m.pyc": b"no",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        documents = read(tmp_path)
    assert documents == [("a/deep/y.txt", b"why"), ("a/z.md", b"zed"), ("b.txt", b"bee")]
    assert (
        "left out 1 files that are not text (they hold NUL bytes), such as picture.png"
        in caplog.text
    )
    # What is asked for by name is read whatever it holds.
    assert read(tmp_path / "picture.png") == [("picture.png", b"\x89PNG\0\0")]


def test_globs_and_several_paths_without_reading_twice(tmp_path: Path):
    for name in ("x1.txt", "x2.txt", "sub/x3.txt", "other.md", "x[1].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link.txt").symlink_to(tmp_path / "x1.txt")
    names = [name for name, _ in read(tmp_path / "**" / "x?.txt")]
    assert names == ["sub/x3.txt", "x1.txt", "x2.txt"]
    # A file whose name looks like a glob is that file.
    assert read(tmp_path / "x[1].txt") == [("x[1].txt", b"x[1].txt")]
    names = [name for name, _ in read(tmp_path / "x2.txt", tmp_path / "*.txt", tmp_path / "sub")]
    assert names == ["x2.txt", "link.txt", "x[1].txt", "x3.txt"]


def test_packed_files_and_records(tmp_path: Path):
    (tmp_path / "1.txt.gz").write_bytes(gzip.compress(b"one"))
    (tmp_path / "2.txt.xz").write_bytes(lzma.compress(b"two"))
    lines = [json.dumps({"text": f"line {i}\u00e9", "id": i}) for i in range(3)]
    (tmp_path / "3.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "4.jsonl.gz").write_bytes(gzip.compress(lines[0].encode()))
    write_records(tmp_path / "5.array_record", [b"raw text", lines[1].encode()])
    assert read(tmp_path) == [
        ("1.txt.gz", b"one"),
        ("2.txt.xz", b"two"),
        ("3.jsonl:1", "line 0\u00e9".encode()),
        ("3.jsonl:3", "line 1\u00e9".encode()),
        ("3.jsonl:5", "line 2\u00e9".encode()),
        ("4.jsonl.gz:1", "line 0\u00e9".encode()),
        ("5.array_record:0", b"raw text"),
        ("5.array_record:1", "line 1\u00e9".encode()),
    ]


def test_another_field_can_be_named(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"body": "here"}\n')
    assert read(tmp_path, text_field="body") == [("a.jsonl:1", b"here")]


def test_paths_that_hold_nothing(tmp_path: Path):
    (tmp_path / "nothing").mkdir()
    assert "missing.txt'" in refused(tmp_path / "missing.txt")
    assert "the glob matches no file" in refused(tmp_path / "*.nope")
    assert "the folder holds no files" in refused(tmp_path / "nothing")
    assert "data.path is empty" in refused()


BAD_LINES = {
    b'{"text": "ok"}\n{"texts": 1}\n': "bad.jsonl:2 has no field 'text' (it has ['texts'])",
    b'{"text": "ok"}\n[1]\n': "bad.jsonl:2 has no field 'text' (it is no JSON object)",
    b'{"text": 5}\n': "bad.jsonl:1: the field 'text' is int, not a string",
    b'\n\n{"text": \n': "bad.jsonl:3 is not JSON",
    b'{"text": "\xff"}\n': "bad.jsonl:1 is not JSON",
    b'{"text": "\\ud800"}\n': "bad.jsonl:1: 'text' holds half a character",
}


@pytest.mark.parametrize("content", BAD_LINES)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, content: bytes):
    (tmp_path / "bad.jsonl").write_bytes(content)
    assert BAD_LINES[content] in refused(tmp_path)


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("xz", lzma.compress)])
def test_damaged_packed_files_are_named(tmp_path: Path, suffix: str, pack: Callable):
    good = pack(bytes(range(256)) * 40)
    flipped = bytes(b ^ 0x55 if i == len(good) // 2 else b for i, b in enumerate(good))
    for content in (good[: len(good) // 2], b"plain text", flipped):
        (tmp_path / f"f.txt.{suffix}").write_bytes(content)
        assert f"f.txt.{suffix} is damaged or no .{suffix} file" in refused(tmp_path)


def test_an_array_record_file_cut_short_or_changed_is_refused(tmp_path: Path):
    file = tmp_path / "f.array_record"
    write_records(file, [b"some text %d" % i for i in range(600)])
    assert [d for _, d in read(file)] == [b"some text %d" % i for i in range(600)]
    whole = file.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 5):
        file.write_bytes(whole[:length])
        assert "f.array_record is damaged or no ArrayRecord file" in refused(tmp_path)
    for place in (100, 5000):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        assert "f.array_record is damaged or no ArrayRecord file" in refused(tmp_path)
    write_records(file, [])
    assert "f.array_record holds 0 records" in refused(tmp_path)


def test_array_record_without_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_records(tmp_path / "f.array_record", [b"some text"])
    monkeypatch.setitem(sys.modules, "array_record.python.array_record_module", None)
    assert "pip install 'memtrain[arrayrecord]'" in refused(tmp_path)
