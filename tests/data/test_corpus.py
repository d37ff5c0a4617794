import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from memtrain.data import corpus as corpus_module
from memtrain.data.corpus import Corpus, build_corpus, cache_folder
from memtrain.data.tokenizer import ByteTokenizer, load_tokenizer
from memtrain.errors import BadInput, StorageFailed


def build(*paths: str) -> Corpus:
    return build_corpus(paths, ByteTokenizer(), text_field="text")


@pytest.fixture
def at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as at rest from the moment they are written, so that no test has to wait."""
    monkeypatch.setattr(corpus_module, "_RACY_NS", 0)


def test_tokens_names_and_order(books: str):
    corpus = build(books)
    files = sorted(Path(books).iterdir())
    assert corpus.names == [file.name for file in files]
    assert corpus.tokens.dtype == np.uint8
    assert corpus.tokens.tobytes() == b"".join(file.read_bytes() for file in files)
    assert isinstance(corpus.tokens, np.memmap)


def test_the_cache_is_used_and_never_stale(books: str, at_rest: None, monkeypatch):
    first = build(books)
    monkeypatch.setattr(corpus_module, "read_documents", lambda *_: pytest.fail("read again"))
    assert build(books).digest == first.digest
    monkeypatch.undo()
    monkeypatch.setenv("MEMTRAIN_CACHE", str(Path(books).parent / "cache"))
    (Path(books) / "book00.txt").write_text("other content")
    assert build(books).digest != first.digest


def test_files_that_changed_just_now_are_read_again(books: str):
    file = Path(books) / "book00.txt"
    first = build(books)
    info = file.stat()
    content = file.read_bytes()
    file.write_bytes(content[::-1])  # as long as before, and within the clock's tick
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert build(books).digest != first.digest


def test_many_at_once_build_one_corpus(books: str, cache: Path):
    with ThreadPoolExecutor(8) as pool:
        corpora = list(pool.map(lambda _: build(books), range(8)))
    assert len({c.digest for c in corpora}) == 1
    assert all(np.array_equal(c.tokens, corpora[0].tokens) for c in corpora)
    folders = [p for p in (cache / "corpora").iterdir() if p.is_dir()]
    assert len(folders) == 1


@pytest.mark.parametrize("damage", ["tokens.bin", "meta.json", "offsets.npy", "names.json"])
def test_a_damaged_cache_is_built_again(books: str, cache: Path, at_rest: None, damage: str):
    first = build(books)
    (folder,) = [p for p in (cache / "corpora").iterdir() if p.is_dir()]
    content = (folder / damage).read_bytes()
    (folder / damage).write_bytes(content[: len(content) // 2])
    again = build(books)
    assert again.digest == first.digest and len(again.tokens) == len(first.tokens)
    assert (folder / damage).read_bytes() == content
    assert [p for p in (cache / "corpora").iterdir() if p.is_dir()] == [folder]


def test_a_full_disk_leaves_nothing_half_written(texts: Callable[..., str], cache: Path):
    folder = texts(a="x" * 300_000, b="y" * 300_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(StorageFailed, match="MEMTRAIN_CACHE names another folder") as raised:
            build(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.exit_code == 74 and "\n" not in str(raised.value)
    assert list((cache / "corpora").iterdir()) == []


def test_a_cache_that_cannot_be_made(books: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MEMTRAIN_CACHE", str(Path(books) / "book00.txt"))
    with pytest.raises(StorageFailed, match=r"the cache .*book00\.txt.* cannot be written"):
        build(books)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MEMTRAIN_CACHE", "/somewhere/else")
    assert cache_folder() == Path("/somewhere/else")
    monkeypatch.delenv("MEMTRAIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/x")
    assert cache_folder() == Path("/var/x/memtrain")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "memtrain"


def test_leftovers_of_killed_processes_are_removed_after_a_day(books: str, cache: Path):
    for name, age in (("tmp-old", 100_000), ("tmp-new", 100)):
        left = cache / "corpora" / name
        left.mkdir(parents=True)
        (left / "tokens.bin").write_text("x")
        os.utime(left, (time.time() - age, time.time() - age))
    build(books)
    assert not (cache / "corpora" / "tmp-old").exists() and (cache / "corpora" / "tmp-new").exists()


def test_the_split_is_by_content_and_keeps_to_its_share(texts: Callable[..., str]):
    folder = texts(**{f"f{i}": f"text {i // 2}\n" for i in range(1000)})  # every text twice
    corpus = build(folder)
    train_ids, _ = corpus.split("train", 0.1)
    held_ids, held = corpus.split("validation", 0.1)
    assert sorted([*train_ids, *held_ids]) == list(range(1000))
    assert 70 < len(held_ids) < 130
    content = {i: (Path(folder) / corpus.names[i]).read_bytes() for i in range(1000)}
    assert not {content[i] for i in train_ids} & {content[i] for i in held_ids}
    read = [corpus.tokens[a:b].tobytes() for a, b in zip(held.begins, held.ends, strict=True)]
    assert read == [content[i] for i in held_ids]
    # A larger share holds out what a smaller one did, and more.
    assert set(held_ids) < set(corpus.split("validation", 0.3)[0])
    # New files do not move old ones over.
    before = {corpus.names[i] for i in held_ids}
    (Path(folder) / "new.txt").write_text("text of another kind")
    more = build(folder)
    after = {more.names[i] for i in more.split("validation", 0.1)[0]}
    assert after - {"new.txt"} == before


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_no_side_of_two_documents_is_empty(texts: Callable[..., str], fraction: float):
    corpus = build(texts(a="one text", b="and another"))
    sides = [set(corpus.split(side, fraction)[0]) for side in ("train", "validation")]  # pyright: ignore
    assert all(sides) and not sides[0] & sides[1]


def test_of_one_document_the_end_is_held_out(texts: Callable[..., str]):
    corpus = build(texts(a=bytes(range(1, 201))))
    train, held = (corpus.split(side, 0.1)[1] for side in ("train", "validation"))  # pyright: ignore
    assert (train.begins, train.ends) == (0, 180)
    assert (held.begins, held.ends) == (180, 200)
    assert corpus.split("validation", 0)[1].num_tokens == 0
    assert corpus.split("train", 0)[1].num_tokens == 200


def test_no_text_at_all(texts: Callable[..., str], cache: Path):
    with pytest.raises(BadInput, match="holds no text: every file is empty or binary"):
        build(texts(a="", b=""))
    assert list((cache / "corpora").iterdir()) == []


def test_text_that_is_not_utf8(texts: Callable[..., str], tmp_path: Path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.BPE({"a": 0}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel()  # pyright: ignore
    inner.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    folder = texts(good="aaa", latin=b"caf\xe9 au lait")
    with pytest.raises(
        BadInput, match=r'^latin\.txt is not UTF-8 at byte 3, .*"bytes" reads any file$'
    ):
        build_corpus((folder,), tokenizer, text_field="text")
    assert build(folder).tokens.tobytes() == b"aaacaf\xe9 au lait"


def test_building_a_pipeline_imports_no_jax(books: str):
    program = (
        "import sys; from memtrain.data.pipeline import build_pipeline;"
        "from memtrain.data.config import DataConfig;"
        f"p = build_pipeline(DataConfig(path=({books!r},)), seq_len=32, batch_size=2);"
        "p.validation_batches(1); print('jax' in sys.modules, 'grain' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("False False", "")


def test_joined_documents_are_one_text_and_its_end_is_held_out(books: str):
    corpus = build(books)
    whole = b"".join(file.read_bytes() for file in sorted(Path(books).iterdir()))
    sides = {}
    for side in ("train", "validation"):
        ids, documents = corpus.split(side, 0.25, joined=True)
        assert ids.tolist() == [0] and len(documents.begins) == 1
        sides[side] = documents.tokens[documents.begins[0] : documents.ends[0]].tobytes()
    assert sides["train"] + sides["validation"] == whole
    assert len(sides["validation"]) == pytest.approx(0.25 * len(whole), abs=1)
    ids, documents = corpus.split("validation", 0.0, joined=True)
    assert not len(ids) and documents.num_tokens == 0
