"""Text from an artifact."""

import numpy as np
import pytest

from memtrain.data.tokenizer import load_tokenizer
from memtrain.decode.artifact import Artifact
from memtrain.decode.generate import TextStream, generate
from memtrain.errors import ArtifactError, BadInput


@pytest.fixture(scope="module")
def artifact(artifact_path):
    return Artifact.load(artifact_path)


def test_greedy_text_is_the_training_paths(artifact, model, artifact_path):
    """Each token is the likeliest byte after all before it, by the model that keeps no state."""
    from memtrain.decode.golden import training_logits

    pieces = []
    result = generate(
        artifact_path, prompt="Kö", max_tokens=12, temperature=0, stream=pieces.append
    )
    assert result["prompt_tokens"] == 3 and len(result["tokens"]) == 12
    sequence = [*"Kö".encode(), *result["tokens"]]
    starts = np.arange(len(sequence))[None] == 0
    logits, _ = training_logits(model, np.array([sequence], np.int32), starts)
    assert result["tokens"] == logits[0, 2:-1, :256].argmax(-1).tolist()
    assert "".join(pieces) == result["text"] == bytes(result["tokens"]).decode(errors="replace")
    assert result["tokens_per_second"] > 0 and result["prefill_tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens=0"),
        ({"prompt": "x", "seed": -1}, "seed=-1"),
        ({"prompt": "x", "top_p": 2.0}, "top_p=2.0"),
        ({"prompt": "x" * 60, "capacity": 64}, "a capacity of 316, not 64"),
        ({"prompt": "x", "without": ["bank"]}, "no such memory"),
    ],
)
def test_bad_requests_are_one_line(artifact, request_, message):
    with pytest.raises(BadInput, match=message) as error:
        generate(artifact, **request_)
    assert "\n" not in str(error.value)


def test_no_artifact(tmp_path):
    with pytest.raises(ArtifactError, match="is not an exported model"):
        generate(tmp_path, prompt="x")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ArtifactError, match=r"a run and not an exported model.*memtrain export "):
        generate(tmp_path, prompt="x")


def test_characters_of_several_bytes_come_whole():
    shown = []
    stream = TextStream(load_tokenizer("bytes"), shown.append)
    for byte in "aé€😀b".encode() + b"\xff\xe2\x82":
        stream.push(byte)
    stream.finish()
    assert shown == ["a", "é", "€", "😀", "b", "\ufffd", "\ufffd"]
    assert stream.text == "aé€😀b\ufffd\ufffd"


def test_text_tokenizers_stream_what_they_decode(tmp_path):
    """A byte-level vocabulary of 256 tokens: characters are put together from several of them."""
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet)
    inner.train_from_iterator([], trainer)
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    shown = []
    stream = TextStream(tokenizer, shown.append)
    ids = tokenizer.encode(" naïve 😀 text")
    assert len(ids) > 15
    for token in ids:
        stream.push(int(token))
    stream.finish()
    assert stream.text == "".join(shown) == " naïve 😀 text"
    assert "😀" in shown
