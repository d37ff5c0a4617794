"""Which rows of a memory table may be written to add something to what a trained model knows.

Sparse memory finetuning (Lin et al. 2025, arXiv 2510.15103): a model stays as it is but for a few
rows of its tables, those that the new data reads and that what was learned before does not. Rows
are ranked by the TF-IDF of their reads,

    score(i) = c(i) / sum_j c(j) * log((D + 1) / (d(i) + 1))

with c(i) the reads of row i by the new data, and d(i) the documents that read it, of D documents of
the data that the model was trained on. What counts are the reads at tokens that are in the loss:
all of a text, the answers of a task. (The paper's d counts batches; a batch of many short documents
reads nearly every row of a small table, and would tell nothing.)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, Float, Int

from memtrain.config import Experiment
from memtrain.data.batch import Batch
from memtrain.data.pipeline import Pipeline, build_pipeline
from memtrain.errors import BadInput
from memtrain.model.parameters import Parameters
from memtrain.parallel.mesh import local_rows
from memtrain.parallel.sharding import kernels_over, replicated
from memtrain.train.feed import on_devices
from memtrain.train.init_from import Source, experiment_at
from memtrain.train.state import Plan, TrainState
from memtrain.train.step import arranged, batch_shardings, context_of
from memtrain.train.table_gradients import PREFIX, read_shapes
from memtrain.train.tables import OptimizerState


@dataclass(frozen=True)
class RowCounts:
    """What some data read of a table. reads: of each row, int64 [N]. documents: how many read it at
    all, int64 [N]; of num_documents."""

    reads: Int[np.ndarray, "N"]
    documents: Int[np.ndarray, "N"]
    num_documents: int


def added(counts: Sequence[RowCounts]) -> RowCounts:
    """Of several data together."""
    return RowCounts(
        sum((count.reads for count in counts), np.zeros((), np.int64)),
        sum((count.documents for count in counts), np.zeros((), np.int64)),
        sum(count.num_documents for count in counts),
    )


def scores(new: RowCounts, before: RowCounts) -> Float[np.ndarray, "N"]:
    """The TF-IDF of each row: 0 where nothing new reads it, or all that was known before does."""
    share = new.reads / max(1, new.reads.sum())
    return share * np.log((before.num_documents + 1) / (before.documents + 1))


def best_rows(score: Float[np.ndarray, "N"], rows: int) -> Bool[np.ndarray, "N"]:
    """The `rows` that score most, of equal ones the first; none that scores nothing."""
    chosen = np.zeros(len(score), np.bool_)
    order = np.argsort(-score, kind="stable")[:rows]
    chosen[order[score[order] > 0]] = True
    return chosen


def background_of(source: Source, plan: Plan, say: Callable[[str], None]) -> list[Pipeline]:
    """What the model that an edit starts from was trained on, in rows of the edit's length; and
    what the run was trained on that it began from in turn, and so on.

    Raises BadInput where it is not on this machine, or the edit cannot be made.
    """
    if not plan.tables.names:
        raise BadInput(
            "train.edit: there is no memory table whose rows could be chosen; it takes a model with"
            ' one that is not frozen, and optimizer.table_update="lazy"'
        )
    for table, reason in read_shapes(plan.skeleton)[1].items():
        if PREFIX + table in plan.tables.names:
            raise BadInput(f"train.edit: table {table!r}: {reason}")
    if fresh := sorted(source.wanted - source.fits.keys()):
        raise BadInput(
            f"train.edit: {source.name} has nothing that fits {', '.join(fresh[:4])}"
            f"{', ...' * (len(fresh) > 4)}; an edit trains no fresh parameters, so give the model "
            "that the source has"
        )
    found, name, experiment = [], source.name, source.experiment
    while True:
        found.append(_pipeline(name, experiment, plan))
        if experiment.train.init_from is None:
            return found
        after, name = name, experiment.train.init_from
        try:
            experiment = experiment_at(name)
        except BadInput as error:
            say(f"train.edit: {after} began from {name}, whose data are not counted: {error}")
            return found


def _pipeline(name: str, experiment: Experiment, plan: Plan) -> Pipeline:
    train = plan.experiment.train
    try:
        pipeline = build_pipeline(
            experiment.data,
            seq_len=train.seq_len,
            batch_size=train.batch_size,
            seed=experiment.train.seed,
        )
    except BadInput as error:
        raise BadInput(f"train.edit: the data that {name} was trained on: {error}") from None
    if pipeline.vocab_size > plan.skeleton.vocab_size:
        raise BadInput(
            f"train.edit: {name} was trained on {pipeline.vocab_size} token ids, and this model "
            f"has {plan.skeleton.vocab_size}"
        )
    return pipeline


def choose_rows(
    state: TrainState,
    plan: Plan,
    pipeline: Pipeline,
    background: Sequence[Pipeline],
    say: Callable[[str], None],
) -> TrainState:
    """`state` with the rows of its tables that may be written, from both data's reads."""
    edit = plan.experiment.train.edit
    assert edit is not None and isinstance(state.optimizer, OptimizerState)
    read = make_reads(plan)
    new = count_reads(read, state.parameters, plan, pipeline, edit.batches)
    counts = [
        count_reads(read, state.parameters, plan, data, edit.background_batches)
        for data in background
    ]
    before = {name: added([count[name] for count in counts]) for name in plan.tables.names}
    shardings = plan.shardings().optimizer.tables
    tables = dict(state.optimizer.tables)
    for name in plan.tables.names:
        chosen = best_rows(scores(new[name], before[name]), edit.rows)
        if not chosen.any():
            raise BadInput(
                f"train.edit: the new data reads no row of {name} that what was learned before "
                "leaves free: none can be written"
            )
        kept = tables[name].writable
        place = shardings[name].writable
        assert kept is not None
        mask = jax.make_array_from_callback(kept.shape, place, lambda at, m=chosen: m[at])
        tables[name] = tables[name]._replace(writable=mask)
        both = int((chosen & (before[name].documents > 0)).sum())
        say(
            f"{name}: {int(chosen.sum()):,} rows may be written, of {len(chosen):,}; "
            f"{int((new[name].reads > 0).sum()):,} are read by the new data, and "
            f"{both:,} of the chosen by {before[name].num_documents:,} documents of the old"
        )
    optimizer = state.optimizer._replace(tables=tables)
    return TrainState(**{**vars(state), "optimizer": optimizer})


Reading = Callable[[Parameters, Batch], Mapping[str, jax.Array]]


def make_reads(plan: Plan) -> Reading:
    """(parameters, batch) -> by table the slots that each token reads, [B, T, R]; -1 for none, and
    for tokens that are not in the loss.
    """
    shapes, _ = read_shapes(plan.skeleton)
    taps = [{place: dict.fromkeys(tables) for place, tables in places.items()} for places in shapes]
    names = plan.tables.names

    def reads(parameters: Parameters, batch: Batch) -> dict[str, jax.Array]:
        model = plan.skeleton.merge(parameters)
        with kernels_over(plan.mesh, plan.tokens):
            batch = arranged(batch, plan)
            ctx = context_of(batch, layout=plan.tokens.layout)
            _, _, aux = model(batch.tokens, None, ctx, taps=taps)
        counts = jnp.asarray(batch.loss_weights > 0)[..., None]
        found: dict[str, list[jax.Array]] = {name: [] for name in names}
        for places in aux:
            for report in places.values():
                for table, read in report.table_reads.items():
                    if PREFIX + table in found:
                        slots = read.slots.reshape(*batch.tokens.shape, -1)
                        slots = plan.tokens.layout.restore(jnp.where(counts, slots, -1))
                        found[PREFIX + table].append(slots)
        return {name: jnp.concatenate(parts, axis=-1) for name, parts in found.items()}

    return jax.jit(
        reads,
        in_shardings=(plan.parameter_shardings(), batch_shardings(plan)),
        out_shardings=replicated(plan.mesh),
    )


def count_reads(
    read: Reading, parameters: Parameters, plan: Plan, pipeline: Pipeline, most: int
) -> dict[str, RowCounts]:
    """Reads of every table by an epoch of the data, or its first `most` batches, from empty
    memories."""
    train = plan.experiment.train
    count = min(most, -(-pipeline.rows_per_epoch // train.batch_size))
    index, processes = local_rows(plan.mesh)
    batches = pipeline.batches(0, process_index=index, process_count=processes)
    rows = {name: plan.skeleton.shapes[name].shape[0] for name in plan.tables.names}
    reads = {name: np.zeros(size, np.int64) for name, size in rows.items()}
    documents = {name: np.zeros(size, np.int64) for name, size in rows.items()}
    total = 0
    for batch in itertools.islice(on_devices(batches, plan.mesh), count):
        starts, valid = (_whole(leaf) for leaf in (batch.starts, batch.valid))
        # A row goes on with a document of its own, where none begins with it.
        starts = starts | (np.arange(starts.shape[1]) == 0)
        document = np.cumsum((starts & valid).ravel()).reshape(starts.shape) - 1
        total += int((starts & valid).sum())
        for name, slots in read(parameters, batch).items():
            slots = np.asarray(slots)
            here = slots >= 0
            reads[name] += np.bincount(slots[here], minlength=rows[name])
            of_document = np.broadcast_to(document[..., None], slots.shape)[here].astype(np.int64)
            pairs = np.unique(of_document * rows[name] + slots[here])
            documents[name] += np.bincount(pairs % rows[name], minlength=rows[name])
    return {name: RowCounts(reads[name], documents[name], total) for name in rows}


def _whole(leaf: Any) -> np.ndarray:
    """All of an array that is spread over processes."""
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
