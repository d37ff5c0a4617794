"""What a run reads. Imports no JAX: the command line builds this before anything heavy."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RecallTask:
    """A generated recall task mixed into the text (see `memtrain.data.tasks.recall`)."""

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
    """Rows in which a passage of text comes a second time (see `memtrain.data.tasks.reread`)."""

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
    random_non_queries: bool = False
    """Whether tokens that neither tell nor ask are any token, not 0."""
    num_train: int = 100_000
    num_validation: int = 3_000


@dataclass(frozen=True, kw_only=True)
class FactsTask:
    """A table of facts to be learned by heart instead of text (see `memtrain.data.tasks.facts`)."""

    num_facts: int = 1_000
    """(entity, relation) pairs, each with a value: 10^3 to 10^6, and more where there is memory."""
    num_relations: int = 4
    """Facts of each entity."""
    num_values: int = 256
    """Different values: log2 of it is what a fact holds, in bits."""
    name_len: int = 3
    """Tokens of an entity's name."""
    name_tokens: int = 64
    """Different tokens that names are made of."""
    first_fact: int = 0
    """Facts that come before those of this run, as another run was taught them: the same table goes
    on."""

    @property
    def num_entities(self) -> int:
        """Of the table up to the last of these facts."""
        return -(-(self.first_fact + self.num_facts) // self.num_relations)

    @property
    def fact_len(self) -> int:
        """Tokens of a fact: the name and the relation. The value is only a target."""
        return self.name_len + 1

    @property
    def vocab_size(self) -> int:
        """Names' tokens, relations and values, in this order."""
        return self.name_tokens + self.num_relations + self.num_values


@dataclass(frozen=True, kw_only=True)
class CopyTask:
    """A passage to be said again after noise, instead of text (`memtrain.data.tasks.distant`)."""

    vocab_size: int = 64
    """A mark, the noise's tokens, and those that passages are made of."""
    noise_tokens: int = 8
    """Different tokens of noise."""
    copy_len: int = 16
    """Tokens of the passage."""
    min_distance: int = 32
    """Tokens from the passage to its copy, drawn alike between this and `max_distance`."""
    max_distance: int = 96
    num_train: int = 100_000
    num_validation: int = 1_000


@dataclass(frozen=True, kw_only=True)
class AssociativeTask:
    """Pairs to be looked up after noise, instead of text (`memtrain.data.tasks.distant`)."""

    vocab_size: int = 256
    """The noise's tokens, keys and values."""
    noise_tokens: int = 8
    """Different tokens of noise."""
    num_pairs: int = 8
    """Pairs at the start of each row. Each is asked for once."""
    min_distance: int = 32
    """Tokens from a pair's key to its question, drawn alike between this and `max_distance`."""
    max_distance: int = 96
    num_train: int = 100_000
    num_validation: int = 1_000


GeneratedTask = MqarTask | FactsTask | CopyTask | AssociativeTask
"""Tasks whose rows are numbers and stand instead of text. Each knows its `vocab_size`."""


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
    facts: FactsTask | None = None
    """If set, rows are facts to be learned by heart and `path` is not read."""
    copy: CopyTask | None = None
    """If set, rows are passages to be copied and `path` is not read."""
    associative: AssociativeTask | None = None
    """If set, rows are pairs to be looked up and `path` is not read."""
    prefetch: int = 4
    """Batches read ahead by a background thread. Operational: may change on resume."""

    @property
    def generated(self) -> dict[str, GeneratedTask]:
        """The tasks that stand instead of text, by the name of their field: at most one works."""
        names = ("mqar", "facts", "copy", "associative")
        return {name: task for name in names if (task := getattr(self, name)) is not None}
