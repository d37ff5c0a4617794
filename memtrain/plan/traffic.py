"""What a training step sends between devices and moves through a device's memory, in bytes."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from memtrain.config import Experiment
from memtrain.memory.bank import BankMemoryConfig
from memtrain.model.language_model import full_pattern
from memtrain.parallel.sharding import mesh_axes
from memtrain.plan.layout import attention_layers, hops_of, lookups, ulysses_of
from memtrain.plan.memory import MemoryEstimate


CONTEXT = "keys and values over context"


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Bytes that leave a device in one step. overlaps: while the device computes."""

    name: str
    bytes: float
    overlaps: bool = True


def transfers(experiment: Experiment, memory: MemoryEstimate, vocab_size: int) -> list[Transfer]:
    """Every kind of exchange of a step, those of no bytes left out."""
    mesh, train, config = experiment.mesh, experiment.train, experiment.model
    parts = train.accumulation_steps
    weights = [leaf for leaf in memory.state.parameters if not leaf.is_table]
    # What a device lacks of the weights comes in for the forward and again for the backward, and
    # its gradients of them go out; as gradients are accumulated, for every part.
    lacking = sum(max(0, leaf.gathered - leaf.local) for leaf in weights)
    moving = sum(max(0, leaf.gathered - leaf.local) for leaf in weights if leaf.trained)
    replicas = _replicas(experiment)
    gradients = memory.state.gradients(train.batch_size * train.seq_len).local
    rows = train.batch_size // (mesh.data * mesh.fsdp)
    tokens = rows * math.ceil(train.seq_len / mesh.context)
    wide = tokens * config.dim * jnp.dtype(config.dtypes.compute).itemsize
    places = sum(
        (block.mixer is not None) + (block.ffn is not None) for block in full_pattern(config)
    )
    found = [
        Transfer("gather weights", 2.0 * lacking * parts),
        Transfer("scatter gradients", 1.0 * moving * parts),
        # A ring all-reduce sends everything twice, but for the part that each has.
        Transfer("sum gradients over replicas", 2.0 * gradients * (replicas - 1) / replicas),
        # After each place forward, and before each backward: the residual stream is whole again.
        Transfer(
            "sum activations over tensor",
            2.0 * wide * 2 * places * config.repeats * (mesh.tensor - 1) / mesh.tensor,
            overlaps=False,
        ),
        Transfer(CONTEXT, _context_bytes(experiment, tokens)),
        Transfer("bank lookups", _bank_bytes(experiment, tokens), overlaps=False),
        Transfer("table lookups", _lookup_bytes(experiment, memory, tokens), overlaps=False),
    ]
    return [transfer for transfer in found if transfer.bytes]


def _replicas(experiment: Experiment) -> int:
    """Devices that hold the same part of the parameters and see other tokens."""
    sizes, sharded = experiment.mesh.sizes, mesh_axes("embed")
    return math.prod(sizes[axis] for axis in ("data", "fsdp", "context") if axis not in sharded)


def _context_bytes(experiment: Experiment, tokens: int) -> float:
    """Forward: keys and values. Backward: those again, and their gradients in float32."""
    config, mesh = experiment.model, experiment.mesh
    if mesh.context == 1:
        return 0.0
    item = jnp.dtype(config.dtypes.compute).itemsize
    total = 0.0
    for _, layer in attention_layers(config):
        head_dim = layer.head_dim or config.dim // layer.num_heads
        kv_heads = math.ceil((layer.num_kv_heads or layer.num_heads) / mesh.tensor)
        heads = math.ceil(layer.num_heads / mesh.tensor)
        chunk = tokens * kv_heads * head_dim * 2
        _, chunks = hops_of(layer, experiment)
        total += chunk * chunks * (2 * item + 4)
        if (ways := ulysses_of(layer, experiment)) > 1:
            # Queries and outputs, keys and values, forward; and the gradients of all, backward.
            exchanged = tokens * head_dim * 2 * (heads + kv_heads) * (ways - 1) / ways
            total += 2 * exchanged * item
    return total * config.repeats


def _bank_bytes(experiment: Experiment, tokens: int) -> float:
    """Queries that go round all devices with what they found; what was picked is sent for, and its
    gradient again."""
    config, mesh = experiment.model, experiment.mesh
    if mesh.context == 1:
        return 0.0
    total = 0.0
    for _, layer in attention_layers(config):
        if isinstance(layer, BankMemoryConfig):
            head_dim = layer.head_dim or config.dim // layer.num_heads
            heads = math.ceil(layer.num_heads / mesh.tensor)
            visit = 4 * head_dim + 12 * layer.top_k
            asked = 8 * layer.top_k + 4 * head_dim
            total += tokens * heads * (mesh.context * visit + 2 * asked)
    return total * config.repeats


def _lookup_bytes(experiment: Experiment, memory: MemoryEstimate, tokens: int) -> float:
    """Where rows of a table are sharded: slots and weights to every part, sums back, and the
    gradients of the sums out again."""
    tables = [leaf for leaf in memory.state.parameters if leaf.is_table]
    total = 0.0
    for lookup in lookups(experiment.model):
        leaf = next(leaf for leaf in tables if leaf.name == f"tables.{lookup.table}")
        parts = leaf.gathered // leaf.local
        if parts > 1:
            asked = lookup.rows * 8
            answered = 2 * lookup.answers * lookup.value_dim * 4
            total += tokens * (parts - 1) * (asked + answered)
    return total * experiment.model.repeats


def memory_traffic(experiment: Experiment, memory: MemoryEstimate) -> float:
    """Bytes through one device's main memory in a step.

    Weights are read forward and backward (and once more where blocks are recomputed); gradients
    written and read; the optimizer reads parameter, gradient and moments and writes all but the
    gradient. Activations are written once and read twice. Table rows are read for every lookup, and
    their gradients read and written. What goes to a host's memory is not counted.
    """
    mesh, train, config = experiment.mesh, experiment.train, experiment.model
    state = memory.state
    parts = train.accumulation_steps
    weights = sum(leaf.gathered for leaf in state.parameters if not leaf.is_table)
    passes = 2 if config.remat == "none" else 3
    step_tokens = train.batch_size * train.seq_len
    gradients = state.gradients(step_tokens).local
    # Of tables that are updated by rows, rows alone are read and written.
    by_rows = state.tables.by_rows_at(step_tokens)
    local = (
        state.parameters_on_device()
        + state.optimizer_on_device()
        - sum(
            state.with_moments(leaf)
            for leaf in state.parameters
            if leaf.name in by_rows and not leaf.on_host
        )
    )
    rows = train.batch_size // (mesh.data * mesh.fsdp)
    tokens = rows * math.ceil(train.seq_len / mesh.context)
    read = sum(lookup.rows * lookup.value_dim * 4 for lookup in lookups(config)) * config.repeats
    return (
        parts * (passes * weights + 3 * memory.kept)
        + 2 * local
        + 2 * memory.row_update
        + 3 * gradients
        + 3.0 * tokens * read / mesh.tensor
    )
