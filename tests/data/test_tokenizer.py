import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers, trainers

from memtrain.data.config import DataConfig, RecallTask
from memtrain.data.corpus import Split
from memtrain.data.fingerprint import check_fingerprint
from memtrain.data.pipeline import TextPipeline, build_pipeline
from memtrain.data.tokenizer import load_tokenizer
from memtrain.errors import BadInput


TEXT = "the cat sat on the mat; the dog sat on the log.\n\u00e9t\u00e9 \u4f60\u597d\n"


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    """A byte-level BPE of 283 tokens, as the library itself writes it."""
    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    inner.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=283,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>"],
        show_progress=False,
    )
    inner.train_from_iterator([TEXT] * 20, trainer)
    inner.enable_truncation(5)  # which would cut documents, if it were heeded
    file = tmp_path / "tokenizer.json"
    inner.save(str(file))
    return file


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    everything = bytes(range(256)) * 2
    ids = tokenizer.encode(everything)
    assert ids.dtype == np.int32 and ids.tolist() == list(everything)
    assert tokenizer.decode_bytes(ids) == tokenizer.decode_bytes(ids.tolist()) == everything
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.decode([0xE9, 65]) == "\ufffdA"
    assert tokenizer.encode("").tolist() == [] and tokenizer.decode_bytes([]) == b""
    assert np.flatnonzero(tokenizer.ends_line).tolist() == [10]
    assert tokenizer.token_dtype == np.uint8 and tokenizer.files() == {}
    for bad in (256, -1):
        with pytest.raises(BadInput, match=f"ids 0 to 255, not {bad}"):
            tokenizer.decode_bytes([65, bad])


def test_a_tokenizer_file(tokenizer_file: Path):
    tokenizer = load_tokenizer(str(tokenizer_file))
    ids = tokenizer.encode(TEXT)
    assert tokenizer.vocab_size == 283 and 5 < len(ids) < len(TEXT.encode())
    assert (
        tokenizer.decode(ids) == TEXT and tokenizer.encode(TEXT.encode()).tolist() == ids.tolist()
    )
    assert tokenizer.encode("<s>").tolist() == [0]
    ends = [i for i in range(283) if tokenizer.decode([i]).endswith("\n")]
    assert ends and np.flatnonzero(tokenizer.ends_line).tolist() == ends
    with pytest.raises(UnicodeDecodeError):
        tokenizer.encode(b"ok \xff")


def test_what_export_copies_is_the_tokenizer(tokenizer_file: Path, tmp_path: Path):
    tokenizer = load_tokenizer(str(tokenizer_file))
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in tokenizer.files().items():
        (copy / name).write_bytes(content)
    tokenizer_file.write_text("changed since")
    again = load_tokenizer(str(copy))
    assert again.fingerprint() == tokenizer.fingerprint() != load_tokenizer("bytes").fingerprint()
    assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()


def test_tokenizers_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bad = tmp_path / "bad.json"
    for content in ("{}", "not json", json.dumps({"model": {"type": "Nope"}}), "\x00"):
        bad.write_text(content)
        with pytest.raises(BadInput, match=r"bad\.json' is not a Hugging Face tokenizer") as raised:
            load_tokenizer(str(bad))
        assert "\n" not in str(raised.value)
    for missing in ("gpt2", str(tmp_path / "none.json"), str(tmp_path)):
        with pytest.raises(BadInput, match='no such file; give "bytes" or the path'):
            load_tokenizer(missing)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(BadInput, match=r"pip install 'memtrain\[tokenizers\]'"):
        load_tokenizer(str(bad))


def test_a_pipeline_of_tokens(tokenizer_file: Path, texts: Callable[..., str]):
    folder = texts(a=TEXT * 30, b=TEXT.upper() * 30, c=TEXT[::-1] * 30)
    config = DataConfig(
        path=(folder,),
        tokenizer=str(tokenizer_file),
        validation_fraction=0.3,
        recall=RecallTask(share=0.5, num_facts=2, num_queries=2),
    )
    pipeline = build_pipeline(config, seq_len=128, batch_size=4, seed=0)
    assert isinstance(pipeline, TextPipeline)
    documents = {p.name: p.read_bytes() for p in Path(folder).iterdir()}
    splits: tuple[Split, Split] = ("train", "validation")
    for split in splits:
        ids, _ = pipeline.corpus.split(split, 0.3)
        names = [pipeline.corpus.names[i] for i in ids]
        num_bytes = sum(len(documents[name]) for name in names)
        num_tokens = sum(len(pipeline.tokenizer.encode(documents[name])) for name in names)
        assert pipeline.bytes_per_token(split) == num_bytes / num_tokens
    for name, tokens in pipeline.validation_documents():
        assert pipeline.tokenizer.decode_bytes(tokens) == documents[name]
    batch = next(pipeline.batches(0))
    assert batch.tokens.max() > 255
    assert "@" in pipeline.tokenizer.decode(batch.tokens.ravel())
    in_bytes = build_pipeline(DataConfig(path=(folder,)), seq_len=128, batch_size=4, seed=0)
    with pytest.raises(BadInput, match=r"data\.tokenizer was 'bytes', is 'sha256:"):
        check_fingerprint(in_bytes.fingerprint(), pipeline.fingerprint())
