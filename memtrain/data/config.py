"""What a run reads. Imports no JAX: the command line builds this before anything heavy."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RecallTask:
    """A generated recall task mixed into the text (see `memtrain.data.recall`)."""

    share: float = 0.1
    """Share of the rows of every batch, on average, that hold this task: 0 to 1."""
    num_facts: int = 8
    """Key-value facts told in one row."""
    num_queries: int = 8
    """Questions in one row; the facts are asked for in turn."""
    name_len: int = 2
    """Letters of a fact's name."""
    value_len: int = 3
    """Letters of what is to be remembered."""
    answer_weight: float = 1.0
    """Loss weight of a token of an answer; text has 1."""
    count_text: bool = True
    """Whether the text around the facts is in the loss too."""


@dataclass(frozen=True, kw_only=True)
class RereadTask:
    """Rows in which a passage of text comes a second time (see `memtrain.data.reread`)."""

    share: float = 0.1
    """Share of the rows of every batch, on average, that are such rows: between 0 and 1."""
    min_len: int = 32
    """Tokens of the shortest passage; the longest is half a row."""


@dataclass(frozen=True, kw_only=True)
class MqarTask:
    """Multi-query associative recall (Arora et al. 2023, Zoology) instead of text."""

    vocab_size: int = 8192
    num_pairs: int = 4
    """Key-value pairs at the start of each row."""
    power: float = 0.01
    """Exponent of the power law from which the gaps to the queries are drawn."""
    num_train: int = 100_000
    num_validation: int = 3_000


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Sources, tokenizer, order and split."""

    path: tuple[str, ...] = ("stdlib",)
    """Files, globs or folders (.txt and any text, .gz, .xz, .jsonl, .array_record), or "stdlib":
    the Python standard library's own source files on this machine."""
    tokenizer: str = "bytes"
    """"bytes", or the path of a Hugging Face `tokenizer.json`."""
    order: Literal["packed", "document"] = "packed"
    """"packed": rows are shuffled pieces. "document": each row of the batch goes on where it
    stopped a step ago, for memories that are carried from step to step."""
    join_documents: bool = False
    """Read all files, in the order of their names, as one document: for rows longer than any file.
    What is held out is its last part then."""
    validation_fraction: float = 0.05
    """Share of the files, chosen by the hash of their content, that is held out."""
    text_field: str = "text"
    """The field of a .jsonl line (or JSON ArrayRecord) that holds the text."""
    seed: int = 0
    recall: RecallTask | None = None
    """A generated recall task mixed into the text."""
    reread: RereadTask | None = None
    """Rows in which a passage comes again, mixed into the text."""
    mqar: MqarTask | None = None
    """If set, rows are MQAR and `path` is not read."""
    prefetch: int = 4
    """Batches read ahead by a background thread. Operational: may change on resume."""
