"""Decodes an artifact with jax, numpy and safetensors alone, from its exported program.

    python model.mtx/program/decode.py "Once upon a time" [--max-tokens 100]    greedy, byte tokens
    python model.mtx/program/decode.py --check              the golden logits, on this machine

This file is copied into the artifact: it imports nothing of memtrain, on purpose. It trusts the
files; `memtrain` checks their sha256.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.export
import numpy as np
from safetensors import safe_open


class Decoder:
    """One sequence. `read(tokens)` gives the logits after each of them, float32 [T, V]."""

    def __init__(self, folder: Path):
        program = folder / "program"
        about = json.loads((program / "program.json").read_text())
        self.chunk, self.capacity = about["chunk"], about["capacity"]
        load = lambda name: jax.export.deserialize(  # noqa: E731
            bytearray((program / f"{name}.jaxexport").read_bytes())
        )
        self._init = jax.jit(load("init").call)
        # An exported program forgets its donation; without it every call would copy the cache.
        self._prefill = jax.jit(load("prefill").call, donate_argnums=1)
        self._step = jax.jit(load("step").call, donate_argnums=1)
        self._weights = {name: jax.device_put(array) for name, array in tensors(folder).items()}
        self.reset()

    def reset(self) -> None:
        self._state = self._init(self._weights)
        self._length = self._position = 0

    def read(self, tokens, starts=None) -> np.ndarray:
        """starts: bool [T], a document begins here; the first token of all always begins one."""
        tokens = np.asarray(tokens, np.int32)
        begins = np.zeros(len(tokens), bool) if starts is None else np.array(starts, bool)
        if self._length + len(tokens) > self.capacity:
            length = self._length + len(tokens)
            raise ValueError(f"{length} tokens, and the program's cache holds {self.capacity}")
        if len(tokens) and not self._length:
            begins[0] = True
        self._length += len(tokens)
        positions = np.zeros(len(tokens), np.int32)
        for i, begin in enumerate(begins):
            positions[i] = self._position = 0 if begin else self._position
            self._position += 1
        logits = []
        for at in range(0, len(tokens), self.chunk):
            size = min(self.chunk, len(tokens) - at)
            width = 1 if size == 1 else self.chunk
            pad = partial(_cut, begin=at, size=size, width=width)
            valid = (np.arange(width) < size)[None]
            call = self._step if width == 1 else self._prefill
            out, self._state = call(
                self._weights, self._state, pad(tokens), pad(positions), pad(begins), valid
            )
            logits.append(np.asarray(out)[0, :size])
        return np.concatenate(logits)


def _cut(array: np.ndarray, *, begin: int, size: int, width: int) -> np.ndarray:
    """[1, width]: `size` elements from `begin`, then zeros."""
    return np.pad(array[begin : begin + size], (0, width - size))[None]


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """The weights by name."""
    found = {}
    for shard in sorted(folder.glob("model-*.safetensors")):
        with safe_open(shard, framework="np") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


def golden_difference(folder: Path, prefill: int = 40) -> tuple[float, float]:
    """(largest difference, mean KL in nats) from the golden logits.

    `prefill` tokens are read in chunks, the others one by one.
    """
    with safe_open(folder / "golden" / "golden.safetensors", framework="np") as file:
        golden = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    decoder, worst, divergence = Decoder(folder), 0.0, []
    for tokens, starts, logits in zip(
        golden["tokens"], golden["starts"] != 0, golden["logits"], strict=True
    ):
        decoder.reset()
        found = [decoder.read(tokens[:prefill], starts[:prefill])]
        for i in range(prefill, len(tokens)):
            found.append(decoder.read(tokens[i : i + 1], starts[i : i + 1]))
        mine = np.concatenate(found)[golden["at"]]
        worst = max(worst, float(np.abs(mine - logits).max()))
        p, q = (_log_softmax(a.astype(np.float64)) for a in (logits, mine))
        divergence.append(np.sum(np.exp(p) * (p - q), axis=-1).mean())
    return worst, float(np.mean(divergence))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="decode a memtrain artifact without memtrain")
    parser.add_argument("prompt", nargs="?")
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--check", action="store_true", help="compare with the golden logits")
    arguments = parser.parse_args()
    folder = Path(__file__).resolve().parent.parent
    if arguments.check:
        with jax.default_matmul_precision("highest"):
            difference, divergence = golden_difference(folder)
        tolerance = json.loads((folder / "golden" / "golden.json").read_text())["tolerance"]
        print(f"golden logits: largest difference {difference:.2e}, mean KL {divergence:.2e} nats")
        print(f"tolerated: {json.dumps(tolerance)}")
        return
    kind = json.loads((folder / "tokenizer" / "kind.json").read_text())["kind"]
    if kind != "bytes" or not arguments.prompt:
        parser.error("give a prompt; only byte tokens are read here, use Decoder for others")
    decoder = Decoder(folder)
    prompt = np.frombuffer(arguments.prompt.encode(), np.uint8)
    if len(prompt) + arguments.max_tokens > decoder.capacity:
        parser.error(
            f"a prompt of {len(prompt)} tokens and {arguments.max_tokens} more do not fit in the "
            f"program's cache of {decoder.capacity}: shorten the prompt or give --max-tokens"
        )
    logits = decoder.read(prompt)
    for _ in range(arguments.max_tokens):
        token = int(logits[-1, :256].argmax())
        sys.stdout.buffer.write(bytes([token]))
        sys.stdout.buffer.flush()
        logits = decoder.read([token])
    print()


if __name__ == "__main__":
    main()
