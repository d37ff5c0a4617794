"""The engine: prefill, decode and score over the memories' own state, in a few fixed shapes.

The core is functional: one state, donated to every call and given back, so that caches are updated
in place. Inputs are cut into chunks of one or two sizes, the last one padded with invalid tokens:
after `warmup` nothing is compiled any more (`compilations` counts).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from memtrain.decode.compilations import compiled_programs
from memtrain.errors import BadInput
from memtrain.memory.protocol import Context, is_leaf_spec
from memtrain.model.ablation import resolve_without
from memtrain.model.language_model import LanguageModel
from memtrain.model.loss import token_losses
from memtrain.model.unstacked import Unstacked, unstack_model


if TYPE_CHECKING:
    from memtrain.decode.artifact import Artifact

SMALL_CHUNK = 32
"""Size of the chunk for short prompts and ends of long ones, where the chunk is larger."""


class Scores(NamedTuple):
    """What `Engine.score` finds for each target."""

    nll: np.ndarray
    """float32 [B, T], in nats; 0 where not valid."""
    correct: np.ndarray
    """bool [B, T]: the target is the likeliest token."""


class Engine:
    """Decodes a batch of sequences, each of at most `capacity` tokens.

    source: an `Artifact`, or a model as it is trained.
    batch: rows that are decoded side by side.
    capacity: tokens of a row since its last reset. Bounds memories that grow; a model whose
      memories are all of fixed size reads streams of any length.
    chunk: tokens of the largest call. Longer inputs are cut, shorter ones padded.
    without: memories that are left out, see `memtrain.model.ablation`.
    """

    def __init__(
        self,
        source: Artifact | LanguageModel | Unstacked,
        *,
        batch: int = 1,
        capacity: int,
        chunk: int = 256,
        without: Sequence[str] = (),
        want_reads: bool = False,
    ):
        for name, value in (("batch", batch), ("capacity", capacity), ("chunk", chunk)):
            if value < 1:
                raise BadInput(f"{name}={value} must be at least 1")
        model = _unstacked(source)
        self.config, self.vocab_size = model.body.config, model.body.vocab_size
        self.batch, self.capacity, self.want_reads = batch, capacity, want_reads
        self.without = resolve_without(self.config, without)
        self.bounded = _grows(model, batch, capacity)
        """Whether more than `capacity` tokens would overflow a memory."""
        chunk = min(chunk, capacity) if self.bounded else chunk
        self.buckets = tuple(sorted({min(SMALL_CHUNK, chunk), chunk}))
        """Lengths of the calls that read more than one token a row."""
        self.compilations = 0
        """Programs compiled inside calls of this engine."""
        # Arguments are flat lists: flattening modules in Python costs a millisecond a token.
        self._weights, self._structure = jax.tree.flatten(model)
        self._init = jax.jit(self._init_state)
        self._reset = jax.jit(self._reset_rows, donate_argnums=1)
        self._fork = jax.jit(self._fork_rows)
        self._last = jax.jit(self._last_logits, donate_argnums=1)
        self._all = jax.jit(self._all_logits, donate_argnums=1)
        self._score = jax.jit(self._token_losses, donate_argnums=1)
        self.reset()

    # Called by jit: arrays in, arrays out.

    def _model(self, weights: list[Array]) -> Unstacked:
        return jax.tree.unflatten(self._structure, weights)

    def _init_state(self, weights):
        empty = jnp.zeros((self.batch, self.vocab_size), jnp.float32)
        return self._model(weights).init_state(self.batch, self.capacity), empty

    def _reset_rows(self, weights, state, rows):
        model = self._model(weights)
        return [
            {
                name: memory.reset(before[name], rows, self.capacity)
                for name, memory in layer.memories().items()
            }
            for layer, before in zip(model.layers, state, strict=True)
        ]

    def _fork_rows(self, weights, state, logits, rows):
        model = self._model(weights)
        forked = [
            {name: memory.fork(before[name], rows) for name, memory in layer.memories().items()}
            for layer, before in zip(model.layers, state, strict=True)
        ]
        return forked, logits[rows]

    def _run(self, weights, state, tokens, meta):
        """meta: int32 [3, B, T], of positions, starts and valid."""
        model = self._model(weights)
        ctx = Context(
            positions=meta[0],
            starts=meta[1] != 0,
            valid=meta[2] != 0,
            want_reads=self.want_reads,
        )
        hidden, state, aux = model(tokens, state, ctx, without=self.without)
        return model, hidden, state, aux

    def _last_logits(self, weights, state, before, tokens, meta):
        """Logits after the last valid token of each row; those from before where there is none."""
        # A step's tokens are [B]: one that was sampled on the device comes as it is.
        tokens = tokens.reshape(meta.shape[1:])
        model, hidden, state, _ = self._run(weights, state, tokens, meta)
        count = meta[2].sum(axis=1)
        last = jnp.maximum(count - 1, 0)[:, None, None]
        hidden = jnp.take_along_axis(hidden, last, axis=1)
        logits = model.body.logits(hidden)[:, 0]
        return jnp.where(count[:, None] > 0, logits, before), state

    def _all_logits(self, weights, state, tokens, meta):
        model, hidden, state, aux = self._run(weights, state, tokens, meta)
        reads = {
            f"{i}.{place}": report.reads
            for i, places in enumerate(aux)
            for place, report in places.items()
            if report.reads
        }
        return (model.body.logits(hidden), reads), state

    def _token_losses(self, weights, state, tokens, meta, targets):
        model, hidden, state, _ = self._run(weights, state, tokens, meta)
        config = model.body.config
        losses = token_losses(
            hidden, model.body.head(), targets, config.loss_chunk_tokens, config.dtypes.matmul
        )
        return losses, state

    # Called by people.

    def warmup(self, *calls: str) -> int:
        """Compiles what the named calls ("prefill", "step", "score", "fork", "reset") will run.

        All of them unless named. Empties all rows. Returns programs compiled.
        """
        before = self.compilations
        wanted = set(calls or ("prefill", "step", "score", "fork", "reset"))
        for length in self.buckets:
            tokens = np.zeros((self.batch, length), np.int32)
            if "prefill" in wanted:
                self.reset()
                self.prefill(tokens)
            if "score" in wanted:
                self.reset()
                self.score(tokens, tokens)
        self.reset()
        if "step" in wanted:
            self.step(np.zeros(self.batch, np.int32))
        if "fork" in wanted:
            self.fork(range(self.batch))
        if "reset" in wanted:
            self.reset([0])
        self.reset()
        return self.compilations - before

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Empties the given rows, or all."""
        with self._counted():
            if rows is None:
                self._state, self.logits = self._init(self._weights)
                self.used = np.zeros(self.batch, np.int64)
                self.next_position = np.zeros(self.batch, np.int64)
                return
            mask = np.zeros(self.batch, bool)
            mask[list(rows)] = True
            self._state = self._reset(self._weights, self._state, mask)
            self.used[mask] = 0
            self.next_position[mask] = 0

    def fork(self, rows: Sequence[int]) -> None:
        """Row i goes on from what row `rows[i]` has read: `fork([0] * batch)` copies the first."""
        index = np.asarray(list(rows), np.int32)
        if index.shape != (self.batch,) or index.min() < 0 or index.max() >= self.batch:
            raise BadInput(f"fork: give {self.batch} row numbers below {self.batch}, not {index}")
        with self._counted():
            self._state, self.logits = self._fork(self._weights, self._state, self.logits, index)
            self.used, self.next_position = self.used[index], self.next_position[index]

    def prefill(self, tokens: Any, *, starts: Any = None) -> Float[Array, "B V"]:
        """Reads tokens and gives the logits after the last one of each row.

        tokens: int [B, T], or one list of ids a row, of any lengths.
        starts: bool in the shape of the tokens: a document begins here. An empty row always begins
          one; nothing else does unless it says so.
        """
        tokens, valid = _padded(tokens, self.batch)
        with self._counted():
            for _, piece, meta in self._pieces(tokens, starts, valid):
                self.logits, self._state = self._last(
                    self._weights, self._state, self.logits, piece, meta
                )
        return self.logits

    def step(
        self, tokens: Int[Any, "B"] | Sequence[Any], *, starts: Any = None
    ) -> Float[Array, "B V"]:
        """Reads one token a row and gives the logits after it. Tokens may be on the device."""
        if np.shape(tokens) != (self.batch,):
            raise BadInput(f"step: give {self.batch} tokens, not {np.shape(tokens)}")
        self._check_capacity(np.ones(self.batch, np.int64))
        if not isinstance(tokens, jax.Array):
            tokens = np.asarray(tokens, np.int32)
            self._check_tokens(tokens)
        with self._counted():
            begins = self.used == 0
            if starts is not None:
                begins = begins | np.asarray(starts, bool)
            positions = np.where(begins, 0, self.next_position)
            meta = np.stack([positions, begins, np.ones_like(begins)])
            meta = meta.astype(np.int32)[:, :, None]
            self.used = self.used + 1
            self.next_position = positions + 1
            self.logits, self._state = self._last(
                self._weights, self._state, self.logits, tokens, meta
            )
        return self.logits

    def score(
        self,
        tokens: Any,
        targets: Any = None,
        *,
        starts: Any = None,
        valid: Any = None,
    ) -> Scores:
        """Negative log-likelihood of the targets, read through the cache chunk by chunk.

        tokens: int [B, T]. targets: int [B, T]; unless given, each token's successor: [B, T - 1].
        starts: as in `prefill`. valid: bool [B, T], one run from the begin of each row.
        The state goes on: the next call continues the same sequences.
        """
        tokens = np.asarray(tokens, np.int32)
        if targets is None:
            scores = self.score(tokens, _successors(tokens), starts=starts, valid=valid)
            inside = np.ones(tokens.shape, bool) if valid is None else np.asarray(valid, bool)
            return Scores(*(np.where(inside[:, 1:], s[:, :-1], 0).astype(s.dtype) for s in scores))
        targets = np.asarray(targets, np.int32)
        if targets.shape != tokens.shape:
            raise BadInput(f"score: targets are {targets.shape}, tokens {tokens.shape}")
        self._check_tokens(targets)
        valid = np.ones(tokens.shape, bool) if valid is None else np.asarray(valid, bool)
        nll = np.zeros(tokens.shape, np.float32)
        correct = np.zeros(tokens.shape, bool)
        with self._counted():
            for begin, piece, meta in self._pieces(tokens, starts, valid):
                wanted = _cut(targets, begin, piece.shape[1])
                losses, self._state = self._score(self._weights, self._state, piece, meta, wanted)
                end = min(begin + piece.shape[1], tokens.shape[1])
                nll[:, begin:end] = np.asarray(losses[0])[:, : end - begin]
                correct[:, begin:end] = np.asarray(losses[1])[:, : end - begin] > 0
        return Scores(np.where(valid, nll, 0), correct & valid)

    def trace(self, tokens: Any, *, starts: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """float32 logits [B, T, V] after every token, and what was read.

        Reads are {"2.ffn": {"slots": [B, T, K], "weights": [B, T, K]}}, empty unless `want_reads`.
        """
        tokens, valid = _padded(tokens, self.batch)
        logits, reads = [], []
        with self._counted():
            for begin, piece, meta in self._pieces(tokens, starts, valid):
                found, self._state = self._all(self._weights, self._state, piece, meta)
                count = min(piece.shape[1], tokens.shape[1] - begin)
                cut = jax.tree.map(lambda a, n=count: np.asarray(a)[:, :n], found)
                logits.append(cut[0])
                reads.append(cut[1])
        joined = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *reads)
        return np.concatenate(logits, axis=1), joined

    @property
    def state_bytes(self) -> int:
        """Bytes of the memories' state."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._state))

    @property
    def weight_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in self._weights)

    def step_memory(self) -> dict[str, int]:
        """Bytes of the compiled step: its temporaries, and what it updates in place."""
        tokens = np.zeros(self.batch, np.int32)
        meta = np.zeros((3, self.batch, 1), np.int32)
        compiled = self._last.lower(self._weights, self._state, self.logits, tokens, meta).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return {
            "temporaries": analysis.temp_size_in_bytes,
            "in_place": analysis.alias_size_in_bytes,
        }

    # How a call is cut into programs of fixed shape.

    def _pieces(self, tokens, starts, valid) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(begin, tokens [B, T], meta [3, B, T]) of each call, T one of the buckets."""
        self._check_tokens(tokens)
        counts = valid.sum(axis=1)
        if (valid != (np.arange(tokens.shape[1]) < counts[:, None])).any():
            raise BadInput("valid tokens must be one run from the begin of each row")
        self._check_capacity(counts)
        begins = np.zeros(tokens.shape, bool) if starts is None else np.array(starts, bool)
        if begins.shape != tokens.shape:
            raise BadInput(f"starts are {begins.shape}, tokens {tokens.shape}")
        begins[:, :1] |= (self.used == 0)[:, None]
        begins &= valid
        positions = _positions(begins, self.next_position)
        last = np.maximum(counts - 1, 0)[:, None]
        after = np.take_along_axis(positions, last, axis=1)[:, 0] + 1
        self.next_position = np.where(counts > 0, after, self.next_position)
        self.used = self.used + counts
        meta = np.stack([positions * valid, begins, valid]).astype(np.int32)
        begin = 0
        while begin < tokens.shape[1]:
            rest = tokens.shape[1] - begin
            size = next((b for b in self.buckets if b >= rest), self.buckets[-1])
            yield begin, _cut(tokens, begin, size), _cut(meta, begin, size)
            begin += size

    def _check_capacity(self, more: np.ndarray) -> None:
        total = int((self.used + more).max())
        if self.bounded and total > self.capacity:
            row = int((self.used + more).argmax())
            have = f" after {int(self.used[row])} in the cache" if self.used[row] else ""
            raise BadInput(
                f"{int(more[row])} tokens{have} are more than the capacity of {self.capacity}: "
                f"make an engine with capacity of at least {total}"
            )

    def _check_tokens(self, tokens: np.ndarray) -> None:
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            bad = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
            raise BadInput(f"token {bad} is not in the vocabulary of {self.vocab_size}")

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        before = compiled_programs()
        try:
            yield
        finally:
            self.compilations += compiled_programs() - before


def _unstacked(source: Artifact | LanguageModel | Unstacked) -> Unstacked:
    if isinstance(source, Unstacked):
        return source
    if isinstance(source, LanguageModel):
        return unstack_model(source)
    return source.weights()


def _grows(model: Unstacked, batch: int, capacity: int) -> bool:
    """Whether the state of some memory depends on the capacity."""
    shapes = [
        [leaf.shape for leaf in jax.tree.leaves(model.state_spec(batch, c), is_leaf=is_leaf_spec)]
        for c in (capacity, 2 * capacity)
    ]
    return shapes[0] != shapes[1]


def _padded(tokens: Any, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 [B, T] and bool [B, T], from an array or from lists of any lengths."""
    rows = [np.asarray(row, np.int32) for row in tokens]
    if len(rows) != batch or any(row.ndim != 1 for row in rows):
        raise BadInput(f"give {batch} rows of tokens, [B, T] or one list of ids each")
    lengths = np.array([len(row) for row in rows])
    padded = np.zeros((batch, lengths.max()), np.int32)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return padded, np.arange(padded.shape[1]) < lengths[:, None]


def _cut(array: np.ndarray, begin: int, size: int) -> np.ndarray:
    """`size` columns from `begin`, zeros past the end."""
    piece = array[..., begin : begin + size]
    missing = size - piece.shape[-1]
    return np.pad(piece, [(0, 0)] * (array.ndim - 1) + [(0, missing)]) if missing else piece


def _positions(begins: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Position of each token in its document, where the token before had `first - 1`."""
    index = np.arange(begins.shape[1])
    newest = np.maximum.accumulate(np.where(begins, index, -1), axis=1)
    return np.where(newest >= 0, index - newest, first[:, None] + index)


def _successors(tokens: np.ndarray) -> np.ndarray:
    return np.pad(tokens[:, 1:], [(0, 0), (0, 1)])
