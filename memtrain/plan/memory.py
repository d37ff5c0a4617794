"""How much memory a device needs for a training step, part by part and moment by moment.

A step holds most either in the loss (all that the forward keeps, and a chunk of logits), in the
backward of one unit of layers, or in the optimizer's update. Each is added up from what is traced
(`activations`), what is sharded (`sizes`), and the buffers that the step is known to make; the
largest is the estimate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp

from memtrain.config import Experiment
from memtrain.plan.activations import Unit, units
from memtrain.plan.layout import attention_layers, lookups
from memtrain.plan.sizes import Leaf, StateSizes, state_sizes


_BATCH_BYTES_PER_TOKEN = 4 * 4 + 2  # four int32 or float32 leaves and two of bool

_ARRAYS_OF_ROWS, _ARRAYS_OF_A_BLOCK = 4, 4
"""Arrays of rows x value_dim in float32 that a table's update holds at once: of all rows that were
read, their gradients sorted and summed; of a block of them, the rows gathered, two moments of each,
and what is scattered back. Counted in programs compiled for CPU: 6.6 (four devices of a data axis)
to 8.3 where all rows are one block."""


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one device."""

    state: StateSizes
    kept: int
    """Activations at the end of the forward."""
    moments: dict[str, dict[str, int]]
    """Moment -> part -> bytes."""
    row_update: int = 0
    """Of the rows of tables that the update holds, where it is by rows."""

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> dict[str, int]:
        """Part -> bytes at the moment that needs most."""
        return self.moments[self.peak_moment]

    @property
    def total(self) -> int:
        return sum(self.peak.values())


def is_scanned(experiment: Experiment, platform: str) -> bool:
    """Whether the repeats are a loop on this platform (see `LanguageModel`)."""
    repeats, unroll = experiment.model.repeats, experiment.model.scan_unroll
    if unroll is None:
        return repeats > 1 and platform != "cpu"
    return unroll < repeats


def estimate_memory(experiment: Experiment, vocab_size: int, platform: str) -> MemoryEstimate:
    """platform: "cpu", "gpu" or "tpu", which decides how layers are run."""
    return _Step(experiment, vocab_size, platform).estimate()


class _Step:
    """One training step on one device."""

    def __init__(self, experiment: Experiment, vocab_size: int, platform: str):
        train, mesh = experiment.train, experiment.mesh
        self.experiment, self.vocab_size = experiment, vocab_size
        self.state = state_sizes(experiment, vocab_size)
        # A table whose gradient is of the rows that were read has none of its own size.
        tables, tokens = self.state.tables, train.batch_size * train.seq_len
        self.by_rows = tables.by_rows_at(tokens)
        self.row_update = sum(
            self._row_update(leaf, tokens)
            for leaf in self.state.parameters
            if leaf.name in self.by_rows
        )
        self.scanned = is_scanned(experiment, platform)
        self.rows = train.batch_size // (mesh.data * mesh.fsdp * train.accumulation_steps)
        self.segments = train.tbptt_segments
        self.tokens = -(-train.seq_len // (mesh.context * self.segments))
        config, repeats = experiment.model, experiment.model.repeats
        self.units = units(
            config,
            self.rows,
            self.tokens,
            tensor=mesh.tensor,
            scanned=self.scanned,
            platform=platform,
        )
        self.repeats = repeats
        self.activation = self.rows * self.tokens * config.dim
        self.activation *= jnp.dtype(config.dtypes.compute).itemsize
        self.layers = [leaf for leaf in self.state.parameters if leaf.name.startswith("blocks.")]
        self.others = [leaf for leaf in self.state.parameters if leaf not in self.layers]

    def _row_update(self, table: Leaf, tokens: int) -> int:
        tables = self.state.tables
        rows = min(tables.rows_read(table.name, tokens), tables.local_rows(table.name))
        width = table.local // tables.local_rows(table.name) // jnp.dtype(table.dtype).itemsize
        block = min(rows, tables.adam.block_rows(width))
        return 4 * width * (_ARRAYS_OF_ROWS * rows + _ARRAYS_OF_A_BLOCK * block)

    def estimate(self) -> MemoryEstimate:
        kept = self.repeats * sum(unit.kept for unit in self.units)
        moments = {
            "loss": self._moment(
                activations=kept,
                logits=self._logits(),
                gradients=self._table_gradients(),
                **self._slices(),
            )
        }
        if self.scanned:
            moments["backward"] = self._backward(self.units[0], kept, repeats_done=self.repeats)
        else:
            self._unrolled(kept, moments)
        twice = 0 if self.scanned or self.repeats == 1 else self._trained(self.layers)
        grads = self._trained(self.state.parameters)
        moments["update"] = self._moment(
            gradients=grads, working=twice, rows_of_tables=self.row_update
        )
        return MemoryEstimate(self.state, kept, moments, self.row_update)

    def _moment(self, **parts: int) -> dict[str, int]:
        train = self.experiment.train
        held = {
            "parameters": self.state.parameters_on_device(),
            "optimizer": self.state.optimizer_on_device(),
            "carry": self.state.carry.local,
            # It comes in whole rows, and is laid over the context axis within the step.
            "batch": _BATCH_BYTES_PER_TOKEN * self.rows * train.seq_len * train.accumulation_steps,
        }
        if train.accumulation_steps > 1 and "gradients" not in parts:
            parts["gradients"] = self._trained(self.state.parameters)
        if self.segments > 1 and "activations" in parts:
            parts["states_between_segments"] = self.segments * self.state.carry.local
        return {name: size for name, size in (held | parts).items() if size}

    def _unrolled(self, kept: int, moments: dict[str, dict[str, int]]) -> None:
        """The backward, layer by layer: activations go as gradients come."""
        width, done = len(self.units), 0
        for repeat in reversed(range(self.repeats)):
            for i in reversed(range(width)):
                moment = self._backward(self.units[i], kept, repeats_done=0, grads=done)
                moments[f"backward of layer {repeat * width + i}"] = moment
                kept -= self.units[i].kept
                done += self._trained(self._of_unit(self.units[i])) // self.repeats

    def _backward(
        self, unit: Unit, kept: int, *, repeats_done: int, grads: int = 0
    ) -> dict[str, int]:
        own = self._of_unit(unit)
        gradients = grads + sum(self._trained(self._of_unit(u)) for u in self.units if repeats_done)
        # The embedding's gradient begins in the loss; that of a table, with each layer that reads.
        gradients += self._trained([leaf for leaf in self.others if not leaf.is_table])
        gradients += self._table_gradients()
        # Sums over parts of the batch, and over segments.
        sums = (self.experiment.train.accumulation_steps > 1) + (self.segments > 1)
        gradients += sums * self._trained(self.state.parameters)
        # Weights of a block and of the next, and its gradients before they are scattered.
        gathered = sum(leaf.gathered for leaf in own if leaf.gathered > leaf.local)
        gathered = gathered // len(unit.blocks)
        parts = {
            "activations": kept,
            "recomputed": unit.working - unit.kept,
            "gradients": gradients,
            "gathered_weights": 3 * gathered // self.repeats,
            "ring": self._ring(unit),
        }
        # Cotangents: where activations are freed on the way, two at a time are new.
        cotangents = (4 if self.scanned else 2) * unit.widest
        slices = self._slices()
        return self._moment(**parts, working=slices.get("working", 0) + cotangents)

    def _table_gradients(self) -> int:
        """XLA makes them zero early; where several layers read, a sum and what is added to it."""
        tables = self._trained([leaf for leaf in self.others if leaf.is_table])
        return tables * min(2, self.repeats * len(lookups(self.experiment.model)))

    def _trained(self, leaves: Sequence[Leaf]) -> int:
        """Bytes of the gradients of these."""
        return sum(leaf.local for leaf in leaves if leaf.trained and leaf.name not in self.by_rows)

    def _of_unit(self, unit: Unit) -> list[Leaf]:
        prefixes = tuple(f"blocks.{i}." for i in unit.blocks)
        return [leaf for leaf in self.layers if leaf.name.startswith(prefixes)]

    def _slices(self) -> dict[str, int]:
        """Copies of the layers' parameters that stay through the step.

        Unrolled repeats are cut out of the stacked parameters, which XLA copies for it. Before a
        loop, it makes all of them narrow at once, where products are.
        """
        stacked = sum(leaf.local for leaf in self.layers)
        if not self.scanned:
            return {"working": 2 * stacked} if self.repeats > 1 else {}
        dtypes = self.experiment.model.dtypes
        matmul, params = (jnp.dtype(name).itemsize for name in (dtypes.matmul, dtypes.params))
        return {"working": stacked * matmul // params} if matmul < params else {}

    def _logits(self) -> int:
        """A chunk's logits, their exponentials and gradients; the head's gradient; and the hidden
        states cut in chunks, with their gradients."""
        config, mesh = self.experiment.model, self.experiment.mesh
        positions = min(self.tokens, max(1, config.loss_chunk_tokens // self.rows))
        vocab = self.vocab_size
        vocab = vocab // mesh.tensor if vocab % mesh.tensor == 0 else vocab
        matmul = jnp.dtype(config.dtypes.matmul).itemsize
        chunk = self.rows * positions * vocab * (4 + 4 + matmul)
        # The head is gathered, and its gradient summed over the devices at the end.
        head = vocab * config.dim * (4 if mesh.num_devices == 1 else 8)
        return chunk + head + 2 * self.activation

    def _ring(self, unit: Unit) -> int:
        """K and V of two hops, and their gradients in float32: one's own and those passing by."""
        mesh = self.experiment.mesh
        if mesh.context == 1:
            return 0
        item = jnp.dtype(self.experiment.model.dtypes.compute).itemsize
        widths = [0]
        for block, layer in attention_layers(self.experiment.model):
            if block in unit.blocks:
                kv_heads = layer.num_kv_heads or layer.num_heads
                head_dim = layer.head_dim or self.experiment.model.dim // layer.num_heads
                widths.append(math.ceil(kv_heads / mesh.tensor) * head_dim)
        chunk = self.rows * self.tokens * 2 * max(widths)
        if mesh.context_strategy == "all_gather":
            return chunk * mesh.context * (item + 4)
        return chunk * (2 * item + 2 * 4)
