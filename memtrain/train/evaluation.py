"""Held-out evaluation during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from memtrain.data.batch import Batch


BUCKETS = 16
"""Parts of the row for the curve by context position."""


def evaluate_batches(
    evaluation_step: Callable[[Any, Batch, Any], tuple[dict[str, Any], Any]],
    parameters: Any,
    batches: Sequence[Batch],
    *,
    carry: Any = None,
    bytes_per_token: float | None,
) -> dict[str, Any]:
    """Means over all weighted tokens of the batches, and bits per byte by context position.

    carry: the empty state that a run with carried memory begins with: its batches go on where the
    one before stopped, held out as in training. `bytes_per_token` is None where tokens are no text:
    then accuracy stands instead of bits.
    """
    sums = []
    for batch in batches:
        found, carry = evaluation_step(parameters, batch, carry)
        sums.append(found)
    total = jax.tree.map(lambda *parts: np.sum([np.asarray(p) for p in parts], axis=0), *sums)
    weight = float(total["weight"])
    loss = float(total["nll"]) / max(weight, 1e-9)
    found: dict[str, Any] = {"validation/loss": loss}
    if bytes_per_token is None:
        found["validation/accuracy"] = float(total["correct"]) / max(weight, 1e-9)
    else:
        bits = 1 / (math.log(2) * bytes_per_token)
        found["validation/bits_per_byte"] = loss * bits
        nll = _by_bucket(total["nll_by_position"])
        weights = _by_bucket(total["weight_by_position"])
        found["validation/bits_per_byte_by_position"] = [
            bits * n / w if w > 0 else math.nan for n, w in zip(nll, weights, strict=True)
        ]
    for name, value in total["memory"].items():
        found[f"validation/memory/{name}"] = float(value) / len(batches)
    return found


def _by_bucket(by_position: np.ndarray) -> list[float]:
    return [float(part.sum()) for part in np.array_split(by_position, BUCKETS)]
