"""Everything a run reads, from its configuration: batches from any sample on, and held-out text."""

import functools
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from memtrain.data.batch import Batch, empty_row, stack_rows
from memtrain.data.config import (
    AssociativeTask,
    CopyTask,
    DataConfig,
    FactsTask,
    GeneratedTask,
    MqarTask,
)
from memtrain.data.corpus import Corpus, Documents, Split, build_corpus
from memtrain.data.rows import DocumentRows, MixedRows, PackedRows, Rows, Stream, num_rows
from memtrain.data.seeded import derive
from memtrain.data.tasks.distant import AssociativeRows, CopyRows
from memtrain.data.tasks.facts import FactRows
from memtrain.data.tasks.generated import Asked, GeneratedRows, stack_asked
from memtrain.data.tasks.mqar import MqarRows
from memtrain.data.tasks.recall import RecallRows, check_recall
from memtrain.data.tasks.reread import RereadRows, check_reread
from memtrain.data.tokenizer import Tokenizer, load_tokenizer
from memtrain.errors import BadInput


FORMAT = 1
"""Raised when the same configuration would read other samples than before."""

VALIDATION_KEY = derive("validation")
"""Held-out rows do not depend on any seed, so that runs can be compared."""


_WITHOUT_END = 1 << 48
"""Samples that Grain is told there are: more than anyone reads, few enough for its arithmetic."""


class Pipeline:
    """What a run reads. Sample i is a pure function of i; a batch is `batch_size` samples.

    Made by `build_pipeline`. Safe to use from several threads.
    """

    vocab_size: int
    tokenizer: Tokenizer | None
    """None for a task that stands instead of text: its tokens are numbers."""
    rows_per_epoch: int
    """Samples after which every training token was read once (not counting a mixed-in task)."""

    def __init__(
        self,
        config: DataConfig,
        *,
        seq_len: int,
        batch_size: int,
        fingerprint: dict[str, Any],
        rows: Rows,
        validation_rows: Rows | None,
        num_validation_rows: int,
    ) -> None:
        self._config = config
        self.seq_len = seq_len
        self.batch_size = batch_size
        self._fingerprint = fingerprint
        self._rows = rows
        self._validation_rows = validation_rows
        self.num_validation_rows = num_validation_rows

    def fingerprint(self) -> dict[str, Any]:
        """JSON object of every field that changes what is read; see `check_fingerprint`."""
        return dict(self._fingerprint)

    def batches(
        self, start_sample: int = 0, *, process_index: int = 0, process_count: int = 1
    ) -> Iterator[Batch]:
        """This process's rows of every batch from sample `start_sample` on, without end.

        Batches are read ahead by a background thread, which ends when the iterator is closed or
        dropped. The cursor is the caller's: the number of samples consumed over all processes.

        Args:
            start_sample: samples consumed before, 0 or more; any number, not only whole batches.
            process_index: which block of the batch's rows, of `process_count` contiguous ones.
        Yields:
            Leaves of [batch_size / process_count, T].
        Raises:
            BadInput: the batch does not divide over the processes.
        """
        local_batch_size = self._local_batch_size(process_count)
        assert start_sample >= 0 and 0 <= process_index < process_count
        first = start_sample + process_index * local_batch_size
        samples = _Samples(self._rows, first, local_batch_size, self.batch_size)
        return _prefetched(samples, local_batch_size, self._config.prefetch)

    def validation_batches(
        self, num_batches: int, process_index: int = 0, process_count: int = 1
    ) -> list[Batch]:
        """The first `num_batches` held-out batches, always the same, as a list.

        Fewer where no more is held out (the last one is then filled up with padding rows), none
        with `data.validation_fraction` 0. Text only, also where a task is mixed in.
        """
        local_batch_size = self._local_batch_size(process_count)
        if self._validation_rows is None:
            return []
        batches = []
        for batch in range(min(num_batches, -(-self.num_validation_rows // self.batch_size))):
            first = batch * self.batch_size + process_index * local_batch_size
            rows = [
                self._validation_rows.row(index)
                if index < self.num_validation_rows
                else empty_row(self.seq_len)
                for index in range(first, first + local_batch_size)
            ]
            batches.append(stack_rows(rows))
        return batches

    def _local_batch_size(self, process_count: int) -> int:
        if self.batch_size % process_count:
            raise BadInput(
                f"train.batch_size={self.batch_size} does not divide over {process_count}"
                " processes; give a multiple"
            )
        return self.batch_size // process_count

    # What only text has; a task that stands instead of it says so.

    def validation_documents(self) -> list[tuple[str, np.ndarray]]:
        """Name and int32 tokens of every held-out document, in the corpus's order."""
        raise self._no_text()

    def text_read(self, num_samples: int) -> Iterator[np.ndarray]:
        """As much text as `num_samples` samples hold: uint8 arrays, each one piece of a document.

        For baselines that are trained on the same bytes. Rows of a mixed-in task are made of the
        same text: plain rows, the next ones, stand in for them. Over an epoch every token comes
        once (but the last of the stream, which is only a target).
        Under a text tokenizer a character that a row cuts in two comes out as U+FFFD.
        """
        raise self._no_text()

    def bytes_per_token(self, split: Split) -> float:
        """Mean bytes of a token: nats per token / this / ln 2 = bits per byte."""
        raise self._no_text()

    def _no_text(self) -> BadInput:
        names = ", ".join(f"data.{name}" for name in self._config.generated)
        return BadInput(f"{names} reads no text; this asks for text")


class TextPipeline(Pipeline):
    """Documents, packed or in order, perhaps with a recall task mixed in."""

    tokenizer: Tokenizer

    def __init__(
        self,
        config: DataConfig,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        corpus: Corpus,
        tokenizer: Tokenizer,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.corpus = corpus
        fraction = config.validation_fraction
        split = functools.partial(corpus.split, fraction=fraction, joined=config.join_documents)
        self._train_ids, train = split("train")
        self._validation_ids, self._held_out = split("validation")
        _check_size(config, train, seq_len, batch_size)
        key = derive("text", config.seed, seed)

        def rows_of(documents: Documents, key: int) -> PackedRows | DocumentRows:
            stream = Stream(documents, key)
            if config.order == "document":
                return DocumentRows(stream, seq_len, batch_size)
            return PackedRows(stream, seq_len, key)

        self._text_rows = rows_of(train, key)
        self.rows_per_epoch = self._text_rows.rows_per_epoch
        rows: Rows = self._text_rows
        left = 1.0  # the share of all rows that `rows` has to fill
        if config.recall is not None:
            left -= config.recall.share
        if config.reread is not None:
            reread = RereadRows(config.reread, train, seq_len, derive(key, "reread"))
            rows = MixedRows(rows, reread, config.reread.share / left)
        if config.recall is not None:
            recall = RecallRows(config.recall, tokenizer, train, seq_len, derive(key, "recall"))
            rows = MixedRows(rows, recall, config.recall.share)
        held_out = None
        if self._held_out.num_tokens > 1:
            held_out = rows_of(self._held_out, VALIDATION_KEY)
        super().__init__(
            config,
            seq_len=seq_len,
            batch_size=batch_size,
            fingerprint={
                **_common_fingerprint(config, seq_len, batch_size, seed),
                "data.content": corpus.digest,
                "data.tokenizer": tokenizer.fingerprint(),
                "data.order": config.order,
                "data.validation_fraction": config.validation_fraction,
                "data.recall": None if config.recall is None else asdict(config.recall),
                "data.reread": None if config.reread is None else asdict(config.reread),
                **({"data.join_documents": True} if config.join_documents else {}),
            },
            rows=rows,
            validation_rows=held_out,
            num_validation_rows=0 if held_out is None else held_out.rows_per_epoch,
        )

    def train_documents(self) -> Documents:
        """The spans that are trained on, as filler for generated tasks."""
        fraction, joined = self._config.validation_fraction, self._config.join_documents
        return self.corpus.split("train", fraction, joined=joined)[1]

    def held_out_documents(self) -> Documents:
        """The spans that are held out."""
        return self._held_out

    def validation_documents(self) -> list[tuple[str, np.ndarray]]:
        spans = zip(self._validation_ids, self._held_out.begins, self._held_out.ends, strict=True)
        tokens = self.corpus.tokens
        return [(self.corpus.names[i], tokens[a:b].astype(np.int32)) for i, a, b in spans]

    def text_read(self, num_samples: int) -> Iterator[np.ndarray]:
        for index in range(num_samples):
            row = self._text_rows.row(index)
            tokens = row.tokens[row.valid]
            for piece in np.split(tokens, np.flatnonzero(row.starts[row.valid])):
                if len(piece):
                    yield np.frombuffer(self.tokenizer.decode_bytes(piece), np.uint8)

    def bytes_per_token(self, split: Split) -> float:
        ids = self._train_ids if split == "train" else self._validation_ids
        if self._config.join_documents:
            ids = np.arange(len(self.corpus.names))
        return self.corpus.bytes_per_token(ids) if len(ids) else 1.0


_GENERATED: dict[type, Any] = {
    MqarTask: MqarRows,
    FactsTask: FactRows,
    CopyTask: CopyRows,
    AssociativeTask: AssociativeRows,
}
"""Makers of `GeneratedRows`: (task, seq_len, set_key=, order_key=)."""


class GeneratedPipeline(Pipeline):
    """A generated task instead of text."""

    tokenizer = None

    def __init__(
        self,
        config: DataConfig,
        name: str,
        task: GeneratedTask,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.name, self.task = name, task
        self.vocab_size = task.vocab_size
        # The sets belong to data.seed alone: runs with other train seeds are asked the same.
        made: GeneratedRows = _GENERATED[type(task)](
            task,
            seq_len,
            set_key=derive(name, config.seed),
            order_key=derive(f"{name} order", config.seed, seed),
        )
        self.generated = made
        self.rows_per_epoch = made.rows_per_epoch
        super().__init__(
            config,
            seq_len=seq_len,
            batch_size=batch_size,
            fingerprint={
                **_common_fingerprint(config, seq_len, batch_size, seed),
                f"data.{name}": _as_first_written(task),
            },
            rows=made,
            validation_rows=_HeldOutRows(made),
            num_validation_rows=made.num_held_out,
        )

    def questions(self, begin: int, end: int) -> Asked:
        """Held-out rows begin .. end - 1 of `num_validation_rows`, and how far back answers are."""
        end = min(end, self.num_validation_rows)
        return stack_asked([self.generated.held_out(index) for index in range(begin, end)])


class _HeldOutRows:
    def __init__(self, rows: GeneratedRows) -> None:
        self._rows = rows

    def row(self, index: int) -> Batch:
        return self._rows.held_out(index).batch


def _as_first_written(task: GeneratedTask) -> dict[str, Any]:
    """The task's fields. Those that came later and change nothing as they are, are left out, so
    that a run begun without them goes on."""
    fields = asdict(task)
    if isinstance(task, MqarTask) and not task.random_non_queries:
        del fields["random_non_queries"]
    if isinstance(task, FactsTask) and not task.first_fact:
        del fields["first_fact"]
    return fields


class _Samples:
    """One process's samples, in the order it reads them, as Grain asks for them."""

    def __init__(self, rows: Rows, first: int, local_batch_size: int, batch_size: int) -> None:
        self._rows = rows
        self._first = first
        self._local_batch_size = local_batch_size
        self._batch_size = batch_size

    def __len__(self) -> int:
        return _WITHOUT_END

    def __getitem__(self, index: Any) -> Batch:
        batch, row = divmod(int(index), self._local_batch_size)
        return self._rows.row(self._first + batch * self._batch_size + row)


def _prefetched(samples: _Samples, batch_size: int, prefetch: int) -> Iterator[Batch]:
    import grain  # Takes seconds and brings JAX along, which only who reads batches should pay for.

    dataset = grain.MapDataset.source(samples).batch(batch_size, batch_fn=stack_rows)
    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    iterator = iter(dataset.to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()


def _common_fingerprint(
    config: DataConfig, seq_len: int, batch_size: int, seed: int
) -> dict[str, Any]:
    return {
        "data.format": FORMAT,
        "data.seed": config.seed,
        "train.seed": seed,
        "train.seq_len": seq_len,
        "train.batch_size": batch_size,
    }


def _check_config(config: DataConfig, seq_len: int, batch_size: int) -> None:
    if seq_len < 1 or batch_size < 1:
        raise BadInput(
            f"train.seq_len={seq_len}, train.batch_size={batch_size}: both take 1 or more"
        )
    if not 0 <= config.validation_fraction < 1:
        raise BadInput(
            f"data.validation_fraction={config.validation_fraction}: it takes 0 up to, but not, 1"
        )
    if config.order not in ("packed", "document"):
        raise BadInput(f'data.order={config.order!r}: it takes "packed" or "document"')
    if config.prefetch < 0:
        raise BadInput(f"data.prefetch={config.prefetch}: it takes 0 (no thread) or more")
    mixed = {"data.recall": config.recall, "data.reread": config.reread}
    mixed_in = [name for name, task in mixed.items() if task is not None]
    instead = [f"data.{name}" for name in config.generated]
    if len(instead) > 1:
        raise BadInput(f"{' and '.join(instead)}: rows can hold one of them only")
    if instead and (mixed_in or config.order != "packed"):
        raise BadInput(
            f"{instead[0]} goes neither with data.recall or data.reread nor with"
            ' data.order="document"'
        )
    if mixed_in and config.order != "packed":
        raise BadInput(
            f'{mixed_in[0]} takes data.order="packed": its rows would break the documents of the'
            " lanes"
        )
    shares = [task.share for task in (config.recall, config.reread) if task is not None]
    if sum(shares) >= 1:
        raise BadInput(
            f"{' and '.join(mixed_in)} take {sum(shares):g} of the rows: leave some for the text"
        )


def _check_size(config: DataConfig, train: Documents, seq_len: int, batch_size: int) -> None:
    where = f"data.path={','.join(config.path)!r}"
    have = train.num_tokens
    if have < seq_len + 1:
        raise BadInput(
            f"{where} has {have} training tokens; a row of train.seq_len={seq_len} takes"
            f" {seq_len + 1}"
        )
    if config.order == "document" and num_rows(have, seq_len) < batch_size:
        raise BadInput(
            f"{where} has {num_rows(have, seq_len)} training rows of {seq_len} tokens;"
            f' data.order="document" takes one for each of train.batch_size={batch_size}'
        )


def build_pipeline(
    config: DataConfig, *, seq_len: int, batch_size: int, seed: int = 0
) -> TextPipeline | GeneratedPipeline:
    """Open (on first use: build) what a run reads.

    Args:
        seq_len: tokens of a row.
        batch_size: rows of the whole batch, over all processes.
        seed: the run's seed; with `config.seed` it sets the order of everything read.
    Raises:
        BadInput: see `build_corpus`, `load_tokenizer` and the tasks' checks; a corpus smaller than
            a row; settings that do not go together.
        StorageFailed: the cache cannot be written.
    """
    _check_config(config, seq_len, batch_size)
    for name, task in config.generated.items():
        return GeneratedPipeline(
            config, name, task, seq_len=seq_len, batch_size=batch_size, seed=seed
        )
    tokenizer = load_tokenizer(config.tokenizer)
    if config.recall is not None:
        check_recall(config.recall, tokenizer, seq_len)
    if config.reread is not None:
        check_reread(config.reread, seq_len)
    corpus = build_corpus(config.path, tokenizer, text_field=config.text_field)
    return TextPipeline(
        config,
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
        corpus=corpus,
        tokenizer=tokenizer,
    )
