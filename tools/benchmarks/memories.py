"""What a layer of each memory costs: time of a token in training and at decode, bytes of its state.

One block with one memory, in the way that each is used: a row of `length` tokens forward and
backward from an empty memory, and single tokens after `context` of them. A window is the measure:
times are given beside its own in the same round.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from common import interleaved, median_ratio, write
from flax import nnx

from memtrain.description import BuildContext, Dtypes, LayerDescription
from memtrain.layers import (
    Attention,
    BankMemory,
    Block,
    GatedDeltaNet,
    KimiDelta,
    LinearRecurrence,
    Mamba1,
    Mamba2,
    NGramMemory,
    ProductKeyMemory,
    ShortConv,
    SwiGLU,
    Window,
)
from memtrain.memory.protocol import Context, spec_bytes
from memtrain.model.block import Block as BuiltBlock
from memtrain.train.records import versions


WINDOW = 512
TOKENS = 32
"""Decoded in one measurement."""


@dataclass(frozen=True)
class Options:
    dim: int = 512
    length: int = 2048
    """Tokens of a training row."""
    context: int = 8192
    """Tokens that were read before the ones that are decoded."""
    rounds: int = 7
    out: Path | None = None


def layers(options: Options) -> dict[str, LayerDescription]:
    heads: dict[str, Any] = {"num_heads": options.dim // 64}
    bank_size = options.context - WINDOW
    return {
        "Window(512)": Window(WINDOW, **heads),
        "Attention()": Attention(**heads),
        f"BankMemory(window=512, bank_size={bank_size}, top_k=32)": BankMemory(
            window=WINDOW, bank_size=bank_size, top_k=32, **heads
        ),
        "ProductKeyMemory(num_slots=65536, value_dim=512)": ProductKeyMemory(
            num_slots=65_536, value_dim=512
        ),
        "NGramMemory(num_slots=16384)": NGramMemory(num_slots=16_384, vocab_size=256),
        "ShortConv(4)": ShortConv(4),
        "LinearRecurrence()": LinearRecurrence(),
        "GatedDeltaNet(head_dim=64)": GatedDeltaNet(**heads),
        "KimiDelta(head_dim=64)": KimiDelta(**heads),
        "Mamba2()": Mamba2(),
        "Mamba1()": Mamba1(),
        "SwiGLU(), for comparison": SwiGLU(),
    }


class Case:
    """One memory, with its programs and a state that has read `context` tokens."""

    def __init__(self, layer: LayerDescription, options: Options):
        context = BuildContext(dim=options.dim, dtypes=Dtypes())
        self.block = BuiltBlock(Block(mixer=layer), context, rngs=nnx.Rngs(0))
        self.tables = {
            name: jax.random.normal(jax.random.key(1), (spec.num_slots, spec.value_dim))
            for name, spec in layer.tables().items()
        }
        self.memories, self.options = self.block.memories(), options
        self.x = jax.random.normal(jax.random.key(2), (1, options.length, options.dim))
        self.ids = jax.random.randint(jax.random.key(3), (1, options.context), 0, 256)
        self.graph, parameters = nnx.split(self.block)
        # All that is read is an argument: XLA would fold what it finds as constants.
        self.given = (parameters, self.x, self.tables, self.ids)
        self.train = jax.jit(jax.grad(self._loss, argnums=(0, 1)))
        self.step = jax.jit(self._step, static_argnums=2, donate_argnums=0)
        self.state = self._read()

    def _ctx(self, tables: Any, ids: jax.Array, begin: Any, length: int) -> Context:
        ctx = Context.of_documents(1, length, tables=tables)
        ids = jax.lax.dynamic_slice_in_dim(ids, begin % ids.shape[1], length, axis=1)
        positions = ctx.positions + begin
        return dataclasses.replace(
            ctx, positions=positions, starts=positions == 0, token_ids=ids, begun=None
        )

    def _loss(self, parameters, x, tables, ids):
        # The table's own gradient is of rows, and its optimizer's affair: `tools/bench table`.
        ctx = self._ctx(jax.lax.stop_gradient(tables), ids, jnp.int32(0), x.shape[1])
        y, _, _ = nnx.merge(self.graph, parameters)(x, None, ctx)
        return jnp.sum(y * y)

    def _step(self, state, begin, length, parameters, x, tables, ids):
        ctx = self._ctx(tables, ids, begin, length)
        y, state, _ = nnx.merge(self.graph, parameters)(x[:, :length], state, ctx)
        return state, y

    def _read(self):
        capacity = self.options.context + (self.options.rounds + 2) * TOKENS
        state = {name: m.init_state(1, capacity) for name, m in self.memories.items()}
        for begin in range(0, self.options.context, WINDOW):
            state, _ = self.step(state, jnp.int32(begin), WINDOW, *self.given)
        self.at = self.options.context
        return state

    def training(self) -> None:
        jax.block_until_ready(self.train(*self.given))

    def decode(self) -> None:
        for _ in range(TOKENS):
            self.state, y = self.step(self.state, jnp.int32(self.at), 1, *self.given)
            self.at += 1
        jax.block_until_ready(y)

    def state_bytes(self, capacity: int) -> int:
        return sum(spec_bytes(m.state_spec(1, capacity)) for m in self.memories.values())


def main() -> None:
    options = tyro.cli(Options)
    cases = {name: Case(layer, options) for name, layer in layers(options).items()}
    calls = {name: case.training for name, case in cases.items()}
    trained = interleaved(calls, rounds=options.rounds)
    decoded = interleaved({n: case.decode for n, case in cases.items()}, rounds=options.rounds)
    first = next(iter(cases))
    results: dict[str, Any] = {}
    for name, case in cases.items():
        own = sum(leaf.size for leaf in jax.tree.leaves(nnx.split(case.block)[1]))
        results[name] = {
            "parameters": own,
            "table_numbers": sum(math.prod(t.shape) for t in case.tables.values()),
            "training_us_per_token": statistics.median(trained[name]) / options.length * 1e6,
            "training_over_window": 1 / median_ratio(trained, name, first),
            "decode_us_per_token": statistics.median(decoded[name]) / TOKENS * 1e6,
            "decode_over_window": 1 / median_ratio(decoded, name, first),
            "state_bytes_at_8192": case.state_bytes(8_192),
            "state_bytes_at_1048576": case.state_bytes(1_048_576),
        }
        row = results[name]
        print(
            f"| `{name}` | {own:,} + {row['table_numbers']:,} "
            f"| {row['training_us_per_token']:.0f} us ({row['training_over_window']:.2f}) "
            f"| {row['decode_us_per_token']:.0f} us ({row['decode_over_window']:.2f}) "
            f"| {row['state_bytes_at_8192']:,} | {row['state_bytes_at_1048576']:,} |"
        )
    about = {"device": jax.devices()[0].device_kind, **vars(options), "out": None}
    write(options.out, "memories", {**about, "layers": results}, versions())


if __name__ == "__main__":
    main()
