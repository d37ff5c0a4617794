"""Text to token ids and back: bytes as they are, or a Hugging Face `tokenizers` file."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from memtrain.errors import BadInput


class Tokenizer(ABC):
    """What the rest of memtrain asks of a tokenizer."""

    name: str
    """What `load_tokenizer` was called with: "bytes" or a path."""
    vocab_size: int
    is_text: bool
    """True if it reads UTF-8 only; False if any bytes are good."""

    @abstractmethod
    def encode(self, text: str | bytes) -> np.ndarray:
        """[n] int32 ids. Raises UnicodeDecodeError on bytes that a text tokenizer cannot read."""

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids stand for."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest that differs where the ids would."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """File name -> content of what an exported model must carry for `load_tokenizer`."""

    def decode(self, ids: Iterable[int]) -> str:
        """The ids as text; bytes that are not UTF-8 show as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @cached_property
    def ends_line(self) -> np.ndarray:
        """[vocab_size] bool: the token ends with a line feed."""
        return np.array([self.decode_bytes([i]).endswith(b"\n") for i in range(self.vocab_size)])

    @property
    def token_dtype(self) -> np.dtype:
        """The smallest unsigned type that holds every id."""
        return np.min_scalar_type(max(self.vocab_size - 1, 0))


class ByteTokenizer(Tokenizer):
    """A token is a byte: 256 ids, no others.

    There is no separator: documents are told apart by `Batch.starts`, and 256 divides over any
    mesh. What follows the end of a document is never a target.
    """

    name = "bytes"
    vocab_size = 256
    is_text = False

    def encode(self, text: str | bytes) -> np.ndarray:
        data = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        values = ids if isinstance(ids, np.ndarray) else np.array(list(ids), np.int64)
        unknown = values[(values < 0) | (values > 255)]
        if unknown.size:
            raise BadInput(f"the bytes tokenizer has ids 0 to 255, not {int(unknown[0])}")
        return values.astype(np.uint8).tobytes()

    def fingerprint(self) -> str:
        return "bytes"

    def files(self) -> dict[str, bytes]:
        return {}


class FileTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`. Special tokens in the text are text; none are added."""

    is_text = True

    def __init__(self, path: str) -> None:
        self.name = path
        file = Path(path).expanduser()
        if file.is_dir():
            file = file / "tokenizer.json"
        try:
            self._content = file.read_bytes()
        except OSError as error:
            raise BadInput(
                f'data.tokenizer={path!r}: no such file; give "bytes" or the path of a'
                f" tokenizer.json ({error.strerror})"
            ) from None
        try:
            import tokenizers
        except ImportError:
            raise BadInput(
                f"data.tokenizer={path!r} needs the `tokenizers` extra:"
                " pip install 'memtrain[tokenizers]'"
            ) from None
        try:
            self._inner: Any = tokenizers.Tokenizer.from_str(self._content.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception
            reason = " ".join(str(error).split())
            raise BadInput(
                f"data.tokenizer={path!r} is not a Hugging Face tokenizer.json: {reason}"
            ) from None
        # A file may ask for truncation or padding, which would cut documents without a word.
        self._inner.no_truncation()
        self._inner.no_padding()
        self.vocab_size = 1 + max(self._inner.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str | bytes) -> np.ndarray:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return np.array(self._inner.encode(text, add_special_tokens=False).ids, np.int32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        text = self._inner.decode([int(i) for i in ids], skip_special_tokens=False)
        return text.encode("utf-8")

    def fingerprint(self) -> str:
        return "sha256:" + hashlib.sha256(self._content).hexdigest()

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self._content}


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """The tokenizer "bytes", or the one in a `tokenizer.json` (or a folder that holds one).

    Raises:
        BadInput: the file is missing or no tokenizer, or the `tokenizers` extra is not installed.
    """
    return ByteTokenizer() if name_or_path == "bytes" else FileTokenizer(name_or_path)
