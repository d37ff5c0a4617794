"""The language model: an embedding, a pattern of blocks repeated, and a head."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from memtrain.description import BuildContext, LayerDescription, TableSpec
from memtrain.errors import BadInput
from memtrain.memory.primitives import Linear, RMSNorm
from memtrain.memory.protocol import Aux, Context, MemoryTable, documents_begun
from memtrain.model.block import Block, Taps
from memtrain.model.config import Block as BlockConfig
from memtrain.model.config import ModelConfig
from memtrain.model.embedding import embed
from memtrain.model.feed_forward import SwiGLUConfig
from memtrain.model.repeats import run_scanned, run_unrolled, unstack
from memtrain_kernels.target import current_target


AuxByLayer = list[dict[str, Aux]]
"""For each block, in order of depth, what each of its places reports."""


def full_pattern(config: ModelConfig) -> tuple[BlockConfig, ...]:
    """The pattern with every bare layer written out as a block."""
    if not config.pattern:
        raise BadInput("model.pattern is empty: name at least one block, e.g. (Window(128),)")
    blocks = []
    for entry in config.pattern:
        if isinstance(entry, LayerDescription):
            entry = BlockConfig(mixer=entry, ffn=config.ffn or SwiGLUConfig())
        blocks.append(entry)
    return tuple(blocks)


def table_specs(pattern: Sequence[BlockConfig]) -> dict[str, TableSpec]:
    """The tables that the pattern's layers name. Layers that share one must agree on its shape."""
    found: dict[str, TableSpec] = {}
    for block in pattern:
        for layer in (block.mixer, block.ffn):
            for name, spec in (layer.tables() if layer else {}).items():
                if found.setdefault(name, spec) != spec:
                    raise BadInput(
                        f"model.pattern: table {name!r} is both {found[name]} and {spec}; "
                        "layers that share a table must agree on its shape"
                    )
    return found


class LanguageModel(nnx.Module):
    """Tokens to hidden states; `logits` and `memtrain.model.loss` go on from there.

    Parameters of the blocks at one place of the pattern are stacked along a leading `layers` axis.
    Memory tables are one Variable each, whatever the number of layers that read them.
    """

    def __init__(self, config: ModelConfig, *, vocab_size: int, rngs: nnx.Rngs):
        self.config, self.vocab_size = config, vocab_size
        dim, dtypes = config.dim, config.dtypes
        pattern = full_pattern(config)
        for block in pattern:
            for layer in (block.mixer, block.ffn):
                if layer is not None:
                    layer.check_vocab(vocab_size)
        context = BuildContext(
            dim=dim,
            depth=len(pattern) * config.repeats,
            dtypes=dtypes,
            norm_epsilon=config.norm_epsilon,
        )
        draw = dim**-0.5 * jax.random.normal(rngs.params(), (vocab_size, dim), jnp.float32)
        self.embedding = nnx.Param(draw.astype(dtypes.params), logical_axes=("vocab", "embed"))
        self.blocks = nnx.List([self._stacked(block, context, rngs) for block in pattern])
        self.final_norm = RMSNorm(dim, dtypes=dtypes, epsilon=config.norm_epsilon)
        if not config.tied_embeddings:
            # float32 results: the head's logits are what the loss is computed from.
            head = dataclasses.replace(dtypes, compute="float32")
            self.unembedding = Linear(
                dim, vocab_size, axes=("embed", "vocab"), dtypes=head, rngs=rngs
            )
        self.tables = nnx.Dict(
            {
                name: MemoryTable(
                    (
                        spec.value_dim**-0.5
                        * jax.random.normal(rngs.params(), (spec.num_slots, spec.value_dim))
                    ).astype(dtypes.of_tables),
                    logical_axes=("slots", "value_dim"),
                )
                for name, spec in table_specs(pattern).items()
            }
        )

    def _stacked(self, block: BlockConfig, context: BuildContext, rngs: nnx.Rngs) -> Block:
        keys = jax.random.split(rngs.params(), self.config.repeats)
        return jax.vmap(lambda key: Block(block, context, rngs=nnx.Rngs(key)))(keys)

    @property
    def depth(self) -> int:
        return len(self.blocks) * self.config.repeats

    def layers(self) -> list[Block]:
        """One block per layer, in order of depth: slices of the stacked parameters."""
        columns = [unstack(block, self.config.repeats) for block in self.blocks]
        return [column[repeat] for repeat in range(self.config.repeats) for column in columns]

    def state_spec(self, batch: int, capacity: int) -> list[dict[str, Any]]:
        """For each layer, {place: state spec of its memory}."""
        return [
            {
                name: memory.state_spec(batch, capacity)
                for name, memory in self.blocks[i % len(self.blocks)].memories().items()
            }
            for i in range(self.depth)
        ]

    def init_state(
        self, batch: int, capacity: int, layers: Sequence[Block] | None = None
    ) -> list[dict[str, Any]]:
        """The empty state of every layer."""
        return [
            {name: memory.init_state(batch, capacity) for name, memory in layer.memories().items()}
            for layer in (layers or self.layers())
        ]

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "B T"],
        state: list[dict[str, Any]] | None,
        ctx: Context,
        *,
        layers: Sequence[Block] | None = None,
        without: Sequence[tuple[int, str]] = (),
        taps: Sequence[Taps] | None = None,
    ) -> tuple[Float[Array, "B T D"], list[dict[str, Any]] | None, AuxByLayer]:
        """Normalised hidden states, the new state, and what every layer reports.

        layers: the blocks one by one (`self.layers()`), where they are kept so: a decode step that
          slices stacked parameters copies all of them for every token.
        without: (layer, place) pairs that are left out.
        taps: for each layer, those of the tables that it reads (`Context.taps`): tables are then
          constants, and layers report what they read of them.
        """
        ctx = dataclasses.replace(
            ctx,
            token_ids=tokens,
            tables={name: table[...] for name, table in self.tables.items()},
        )
        ctx = dataclasses.replace(ctx, begun=documents_begun(ctx))
        dtype = jnp.dtype(self.config.dtypes.compute)
        scale = self.config.embedding_scale or self.config.dim**0.5
        x = (embed(self.embedding[...], tokens) * scale).astype(dtype)
        if layers is not None or without or self._unrolls(tokens.shape[1]):
            layers = layers if layers is not None else self.layers()
            x, state, aux = run_unrolled(layers, x, state, ctx, without, self.config.remat, taps)
        else:
            x, state, aux = run_scanned(
                list(self.blocks),
                x,
                state,
                ctx,
                self.config.repeats,
                self.config.scan_unroll or 1,
                self.config.remat,
                taps,
            )
        return self.final_norm(x), state, aux

    def _unrolls(self, length: int) -> bool:
        repeats, unroll = self.config.repeats, self.config.scan_unroll
        if unroll is None:
            return repeats == 1 or length == 1 or current_target().platform == "cpu"
        return unroll >= repeats

    def head(self) -> Float[Array, "V D"]:
        """The matrix that hidden states are compared with."""
        if self.config.tied_embeddings:
            return self.embedding[...]
        return self.unembedding.weight[...].T

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 logits of all given positions: for decoding. Training never forms them whole."""
        matmul = jnp.dtype(self.config.dtypes.matmul)
        return jnp.einsum(
            "btd,vd->btv",
            hidden.astype(matmul),
            self.head().astype(matmul),
            preferred_element_type=jnp.float32,
        )
