"""Kinds of tokens: what a memory contributes differs with what is being predicted."""

from __future__ import annotations

import io
import keyword
import math
import token as token_types
import tokenize
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from memtrain.data.tokenizer import ByteTokenizer
from memtrain.evaluate.bits import Pieces
from memtrain.evaluate.subject import HeldOut


PYTHON_KINDS = ("keyword", "name", "operator", "number", "string", "comment", "space, line end")
TEXT_KINDS = ("begin of a word", "rest of a word", "digit", "punctuation", "space, line end")
RANK_KINDS = ("16 most frequent", "next 112", "next 896", "rarer")
_RANKS = (16, 128, 1024)


def kinds_of(
    held_out: HeldOut, pieces: Pieces
) -> tuple[str, tuple[str, ...], Int[np.ndarray, "N T"]]:
    """What is told apart, the kinds, and the kind of every target; -1 where it has none.

    Bytes of Python source are told apart as Python's own tokenizer sees them, other bytes by
    character; other tokens by how frequent they are in the held-out text.
    """
    if not isinstance(held_out.tokenizer, ByteTokenizer):
        return "by how frequent the token is", RANK_KINDS, _rank_kinds(held_out, pieces)
    documents = np.unique(pieces.document).tolist()
    source = [held_out.names[document].endswith(".py") for document in documents]
    is_python = 2 * sum(source) > len(source)
    found = np.full(pieces.targets.shape, -1)
    for document, is_source in zip(documents, source, strict=True):
        content = held_out.content(document)
        if is_python and not is_source:
            continue
        kinds = python_kinds(content) if is_python else text_kinds(content)
        if kinds is None:
            continue
        for row in np.flatnonzero(pieces.document == document):
            count, begin = int(pieces.valid[row].sum()), int(pieces.begin[row]) + 1
            found[row, :count] = kinds[begin : begin + count]
    if is_python:
        return "by kind of Python token", PYTHON_KINDS, found
    return "by kind of character", TEXT_KINDS, found


def python_kinds(content: bytes) -> Int[np.ndarray, "n"] | None:
    """The kind of each byte of a source file; None where Python cannot read it."""
    space = len(PYTHON_KINDS) - 1
    kinds = np.full(len(content), space)
    lines = content.splitlines(keepends=True)
    begins = np.cumsum([0, *map(len, lines)])
    try:
        text = [line.decode("utf-8") for line in lines]

        def offset(place: tuple[int, int]) -> int:
            row, column = place
            if row > len(text):
                return len(content)
            return int(begins[row - 1]) + len(text[row - 1][:column].encode("utf-8"))

        for found in tokenize.tokenize(io.BytesIO(content).readline):
            kind = _python_kind(found)
            if kind is not None:
                kinds[offset(found.start) : offset(found.end)] = PYTHON_KINDS.index(kind)
    except (SyntaxError, tokenize.TokenError, UnicodeDecodeError):
        return None
    return kinds


def _python_kind(found: tokenize.TokenInfo) -> str | None:
    if found.type == token_types.NAME:
        is_keyword = keyword.iskeyword(found.string) or keyword.issoftkeyword(found.string)
        # `_` and `type` are words of the language in few places, and names everywhere else.
        return "keyword" if is_keyword and found.string not in ("_", "type") else "name"
    simple = {
        token_types.OP: "operator",
        token_types.NUMBER: "number",
        token_types.STRING: "string",
        tokenize.COMMENT: "comment",
    }
    if found.type in simple:
        return simple[found.type]
    # The parts of f-strings (3.12) and t-strings (3.14).
    return "string" if "STRING" in token_types.tok_name[found.type] else None


def text_kinds(content: bytes) -> Int[np.ndarray, "n"]:
    """The kind of each byte of any text. Bytes above 127 count as letters."""
    data = np.frombuffer(content, np.uint8)
    lower = data | 0x20
    letter = ((lower >= ord("a")) & (lower <= ord("z"))) | (data >= 128) | (data == ord("_"))
    digit = (data >= ord("0")) & (data <= ord("9"))
    space = (data == 32) | ((data >= 9) & (data <= 13))
    first = letter & ~np.concatenate([[False], letter[:-1]])
    return np.select([first, letter, digit, space], [0, 1, 2, 4], default=3)


def _rank_kinds(held_out: HeldOut, pieces: Pieces) -> Int[np.ndarray, "N T"]:
    counts = np.zeros(held_out.tokenizer.vocab_size, np.int64)
    for document in range(len(held_out)):
        counts += np.bincount(held_out.tokens(document), minlength=len(counts))
    rank = np.empty(len(counts), np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    return np.where(pieces.valid, np.searchsorted(_RANKS, rank[pieces.targets], side="right"), -1)


def bits_by_kind(
    nll: dict[str, Float[np.ndarray, "N T"]],
    kinds: Int[np.ndarray, "N T"],
    names: tuple[str, ...],
    bytes_per_token: float,
) -> list[dict[str, Any]]:
    """Of every kind that occurs: its share of the targets, and the bits per byte by setting."""
    total = int((kinds >= 0).sum())
    rows = []
    for index, name in enumerate(names):
        mask = kinds == index
        if not mask.any():
            continue
        scale = 1 / (math.log(2) * bytes_per_token)
        bits = {s: float(losses[mask].mean(dtype=np.float64)) * scale for s, losses in nll.items()}
        rows.append({"kind": name, "share": int(mask.sum()) / total, **bits})
    return rows
