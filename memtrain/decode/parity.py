"""Whether decoding says what training said: the check that every export must pass.

The same tokens go through the cache in three ways (one shot, chunked, token by token), and every
logit is compared with that of the training path, which keeps no state at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from memtrain.decode.engine import Engine
from memtrain.decode.golden import (
    GREEDY_MARGIN,
    MAX_DIFFERENCE,
    MAX_MEAN_KL,
    training_logits,
)
from memtrain.decode.standalone import golden_difference
from memtrain.errors import ArtifactError
from memtrain.model.unstacked import Unstacked, stack_model


CHUNK = 24
"""Tokens of a chunk: divides no prompt, so that the last one is padded."""

Reads = dict[str, dict[str, np.ndarray]]
Cut = Callable[[bool], tuple[np.ndarray, Reads]]


def exact_parity(
    model: Unstacked, tokens: np.ndarray, starts: np.ndarray, reference: np.ndarray | None = None
) -> dict[str, Any]:
    """Compares decoding with training in float32; numbers for the manifest.

    reference: logits of the training path, computed unless given.
    Raises ArtifactError where a logit differs by more than 1e-4, or the likeliest token differs
    although it leads by more than 2e-4.

    A memory that selects may break a near tie otherwise than training did: two slots whose weights
    agree to 1e-4, one read here and the other there. From that token on a row is not comparable. So
    where logits differ, what was read is looked at, and rows count up to their first such token; at
    least half of all tokens must count.
    """
    with jax.default_matmul_precision("highest"):
        if reference is None:
            reference, _ = training_logits(stack_model(model), tokens, starts)
        cuts = _cuts(model, tokens, starts)
        return {
            "path": "float32 training logits",
            "tokens": int(tokens.size),
            **{
                name: _compare(name, cut, model, tokens, starts, reference)
                for name, cut in cuts.items()
            },
        }


def kl_parity(
    model: Unstacked, tokens: np.ndarray, starts: np.ndarray, reference: np.ndarray
) -> dict[str, Any]:
    """Mean KL divergence in nats of decoding from `reference`, the float32 training logits.

    Raises ArtifactError where it is above 1e-3.
    """
    found = {}
    for name, cut in _cuts(model, tokens, starts).items():
        if name == "one_shot":  # whole sequences in one call are not how anybody decodes
            continue
        logits, _ = cut(False)
        found[name] = {"mean_kl": mean_kl(reference, logits)}
        if not found[name]["mean_kl"] <= MAX_MEAN_KL:
            raise ArtifactError(
                f"decoding {_said(name)} has a mean KL of {found[name]['mean_kl']:.2e} nats from "
                f"float32 training, more than {MAX_MEAN_KL:.0e}: export in float32"
            )
    return found


def program_parity(folder: Path) -> dict[str, float]:
    """Runs the exported program of an artifact against its golden logits; numbers for the manifest.

    Raises ArtifactError where the mean KL is above 1e-3 nats. What selects may break a near tie
    otherwise than training did, so the largest difference is told and not judged.
    """
    with jax.default_matmul_precision("highest"):
        difference, divergence = golden_difference(folder)
    if not divergence <= MAX_MEAN_KL:
        raise ArtifactError(
            f"the exported program has a mean KL of {divergence:.2e} nats from the golden logits, "
            f"more than {MAX_MEAN_KL:.0e}"
        )
    return {"max_difference": difference, "mean_kl": divergence}


def mean_kl(reference: np.ndarray, logits: np.ndarray) -> float:
    """Mean over tokens of KL(reference || logits), in nats, computed in float64."""
    p, q = (_log_softmax(a.astype(np.float64)) for a in (reference, logits))
    return float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _cuts(model: Unstacked, tokens: np.ndarray, starts: np.ndarray) -> dict[str, Cut]:
    batch, length = tokens.shape

    def chunks_of(size: int) -> Cut:
        def run(want_reads: bool):
            engine = Engine(model, batch=batch, capacity=length, chunk=size, want_reads=want_reads)
            return engine.trace(tokens, starts=starts)

        return run

    def token_by_token(want_reads: bool):
        if want_reads:
            return chunks_of(1)(True)
        engine = Engine(model, batch=batch, capacity=length, chunk=1)
        steps = [np.asarray(engine.step(tokens[:, i], starts=starts[:, i])) for i in range(length)]
        return np.stack(steps, axis=1), {}

    return {
        "one_shot": chunks_of(length),
        "chunked": chunks_of(CHUNK),
        "token_by_token": token_by_token,
    }


def _compare(
    name: str,
    cut: Cut,
    model: Unstacked,
    tokens: np.ndarray,
    starts: np.ndarray,
    reference: np.ndarray,
) -> dict[str, Any]:
    logits, _ = cut(False)
    compared = np.ones(tokens.shape, bool)
    ties = 0
    if not _agree(logits, reference, compared):
        logits, reads = cut(True)
        reference, expected = training_logits(stack_model(model), tokens, starts, want_reads=True)
        first = first_near_ties(expected, reads, tokens.shape)
        ties = int((first < tokens.shape[1]).sum())
        compared = np.arange(tokens.shape[1]) < first[:, None]
    difference = np.abs(logits - reference).max(axis=-1, initial=0, where=compared[..., None])
    greedy = _greedy_differs(logits, reference) & compared
    found = {
        "max_difference": float(difference.max()),
        "greedy_differs": int(greedy.sum()),
        "near_ties": ties,
        "compared": int(compared.sum()),
    }
    if not _agree(logits, reference, compared):
        row, token = np.unravel_index(np.argmax(difference), difference.shape)
        raise ArtifactError(
            f"decoding {_said(name)} does not reproduce training: logits differ by "
            f"{found['max_difference']:.2e} (at most {MAX_DIFFERENCE:.0e}), worst after token "
            f"{token} of prompt {row}, and {found['greedy_differs']} likeliest tokens of "
            f"{found['compared']} differ"
        )
    if 2 * found["compared"] < tokens.size:
        raise ArtifactError(
            f"decoding {_said(name)} cannot be checked: near ties among the slots that memories "
            f"select leave {found['compared']} of {tokens.size} tokens to compare"
        )
    return found


def _agree(logits: np.ndarray, reference: np.ndarray, compared: np.ndarray) -> bool:
    difference = np.abs(logits - reference).max(axis=-1)
    # Written so that NaN does not agree.
    near = (difference <= MAX_DIFFERENCE) & ~_greedy_differs(logits, reference)
    return bool(near[compared].all())


def _greedy_differs(logits: np.ndarray, reference: np.ndarray) -> np.ndarray:
    best = np.partition(reference, -2, axis=-1)[..., -2:]
    clear = best[..., 1] - best[..., 0] > GREEDY_MARGIN
    return clear & (logits.argmax(axis=-1) != reference.argmax(axis=-1))


def first_near_ties(expected: Reads, found: Reads, shape: Sequence[int]) -> np.ndarray:
    """[B] index of each row's first token at which a near tie was broken otherwise; T where none.

    A difference that is no near tie does not count: the row's logits will be held against it.
    """
    first = np.full(shape[0], shape[1])
    for place, reads in expected.items():
        mine = found[place]
        differs = (np.sort(reads["slots"]) != np.sort(mine["slots"])).any(axis=-1)
        for row in range(shape[0]):
            tokens = np.flatnonzero(differs[row])
            if tokens.size and tokens[0] < first[row]:
                t = tokens[0]
                here = {
                    key: (reads[key][row, t], mine[key][row, t]) for key in ("slots", "weights")
                }
                if _is_near_tie(*here["slots"], *here["weights"]):
                    first[row] = t
    return first


def _is_near_tie(slots_a, slots_b, weights_a, weights_b) -> bool:
    """Whether the slots that only one side read carry the same weights, to 1e-4 of them."""
    only_a = np.sort(weights_a[~np.isin(slots_a, slots_b)])
    only_b = np.sort(weights_b[~np.isin(slots_b, slots_a)])
    return only_a.size == only_b.size and np.allclose(only_a, only_b, rtol=1e-4, atol=0)


def _said(name: str) -> str:
    return {"one_shot": "in one shot"}.get(name, name.replace("_", " "))
