"""Golden logits: what the training path says of a few prompts, kept in the artifact.

Whoever decodes the artifact, on whatever device and in whatever program, can compare.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.numpy import save_file

from memtrain.data.tokenizer import Tokenizer
from memtrain.memory.attention import AttentionConfig
from memtrain.memory.protocol import Context
from memtrain.model.config import ModelConfig
from memtrain.model.language_model import LanguageModel, full_pattern


MAX_DIFFERENCE = 1e-4
"""Largest difference of a float32 logit."""
GREEDY_MARGIN = 2e-4
"""The likeliest token must agree where it leads by more than this."""
MAX_MEAN_KL = 1e-3
"""Mean KL divergence in nats from the float32 training path, for lower precisions."""

_LONG_BANK = 4096
"""Tokens beyond which the check goes round a ring once, not twice."""

TOLERANCE = {
    "float32": {"max_difference": MAX_DIFFERENCE, "greedy_margin": GREEDY_MARGIN},
    "bfloat16": {"mean_kl": MAX_MEAN_KL},
}

_MAX_LOGIT_BYTES = 4 << 20
_TEXT = (
    "A memory is worth what it brings back. The library at the harbour kept a card for every ship: "
    "its name, its master, the day it sailed and what it carried. On the third of May the Petrel "
    "left with salt; on the ninth the Heron left with wool. Ask the cards what the Petrel held.\n"
    "def recall(cards, name):\n    for card in reversed(cards):\n        if card.name == name:\n"
    "            return card.cargo\n    raise KeyError(name)\n\n"
)


@dataclass(frozen=True)
class Golden:
    """Prompts and the float32 logits of the training path at some of their tokens."""

    tokens: Int[np.ndarray, "B T"]
    starts: Bool[np.ndarray, "B T"]
    at: Int[np.ndarray, "P"]
    """The tokens after which `logits` are."""
    logits: Float[np.ndarray, "B P V"]

    def save(self, folder: Path) -> None:
        folder.mkdir()
        arrays = {
            "tokens": self.tokens,
            "starts": self.starts.astype(np.uint8),
            "at": self.at,
            "logits": self.logits,
        }
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        save_file(arrays, folder / "golden.safetensors")
        about = {
            "logits": "float32, of the training path (no state), after each token in `at`",
            "tolerance": TOLERANCE,
        }
        (folder / "golden.json").write_text(json.dumps(about, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Golden:
        with safe_open(folder / "golden.safetensors", framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return cls(**arrays | {"starts": arrays["starts"] != 0})


def longest_window(config: ModelConfig) -> int:
    """Positions of the longest window or bank in the model; 1 where there is none."""
    layers = [layer for block in full_pattern(config) for layer in (block.mixer, block.ffn)]
    windows = [layer.ring_tokens or 1 for layer in layers if isinstance(layer, AttentionConfig)]
    return max(windows, default=1)


def golden_prompts(
    config: ModelConfig, vocab_size: int, tokenizer: Tokenizer | None
) -> tuple[Int[np.ndarray, "2 T"], Bool[np.ndarray, "2 T"]]:
    """(tokens, starts): a text, and random ids with a second document in the row.

    Both go on past twice the longest window, so that every ring has wrapped (past a bank of many
    thousands once); the second document begins while the rings are full of the first.
    """
    window = longest_window(config)
    length = max(window + min(window, _LONG_BANK) + 33, 96)
    ids = np.frombuffer(_TEXT.encode(), np.uint8) if tokenizer is None else tokenizer.encode(_TEXT)
    text = np.resize(ids, length) % vocab_size
    noise = np.random.default_rng(20_240_607).integers(0, vocab_size, length)
    starts = np.zeros((2, length), bool)
    starts[:, 0] = True
    starts[1, min(window + 9, length // 2)] = True
    return np.stack([text, noise]).astype(np.int32), starts


def training_logits(
    model: LanguageModel, tokens: np.ndarray, starts: np.ndarray, *, want_reads: bool = False
) -> tuple[Float[np.ndarray, "B T V"], dict[str, Any]]:
    """Logits of the training path (the whole sequence at once, no state), and what was read."""
    index = np.arange(tokens.shape[1])
    begin = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    positions = (index - begin).astype(np.int32)

    @jax.jit
    def forward(model: LanguageModel, tokens, positions, starts):
        valid = jax.numpy.ones_like(starts)
        ctx = Context(positions=positions, starts=starts, valid=valid, want_reads=want_reads)
        hidden, _, aux = model(tokens, None, ctx)
        reads = {
            f"{i}.{place}": report.reads
            for i, places in enumerate(aux)
            for place, report in places.items()
            if report.reads
        }
        return model.logits(hidden), reads

    return jax.device_get(forward(model, tokens, positions, starts))


def kept_positions(length: int, vocab_size: int, batch: int) -> np.ndarray:
    """Which tokens' logits are kept: all while they are small, else evenly chosen, the last too."""
    count = int(np.clip(_MAX_LOGIT_BYTES // (4 * vocab_size * batch), 2, length))
    return np.unique(np.linspace(0, length - 1, count).round().astype(np.int32))
