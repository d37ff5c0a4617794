"""Text from an artifact, as it comes."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from memtrain.data.tokenizer import Tokenizer
from memtrain.decode.artifact import Artifact
from memtrain.decode.engine import SMALL_CHUNK, Engine
from memtrain.decode.sampling import Sampling, sample
from memtrain.errors import BadInput


CAPACITY_STEP = 256
"""The cache is made for the prompt and the answer, rounded up to a multiple of this."""


def generate(
    artifact: Path | Artifact,
    *,
    prompt: str,
    max_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    without: Sequence[str] = (),
    capacity: int | None = None,
    stream: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Goes on from a prompt for `max_tokens` tokens.

    capacity: tokens that the cache holds, prompt and answer together; as many as needed, unless
      given. without: memories that are left out. stream: is handed the text piece by piece, never
      half a character.

    The result's text is the answer without the prompt. Speeds leave compilation out.
    Raises BadInput for an empty prompt, one that does not fit, or a model whose tokens are no text.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    if max_tokens < 1:
        raise BadInput(f"max_tokens={max_tokens} must be at least 1")
    if not 0 <= seed < 2**31:
        raise BadInput(f"seed={seed} must be at least 0 and below 2**31")
    if not isinstance(artifact, Artifact):
        artifact = Artifact.load(artifact)
    tokenizer = artifact.tokenizer
    if tokenizer is None:
        raise BadInput(f"{artifact.path}: its tokens are numbers, not text: there is no prompt")
    ids = tokenizer.encode(prompt)
    if not len(ids):
        raise BadInput("the prompt is empty: give at least one character to go on from")
    needed = len(ids) + max_tokens
    if capacity is None:
        capacity = -(-needed // CAPACITY_STEP) * CAPACITY_STEP
    chunk = SMALL_CHUNK if len(ids) <= SMALL_CHUNK else CAPACITY_STEP
    engine = Engine(artifact, capacity=capacity, chunk=chunk, without=without)
    if engine.bounded and needed > capacity:
        raise BadInput(
            f"a prompt of {len(ids)} tokens and an answer of {max_tokens} need a capacity of "
            f"{needed}, not {capacity}: shorten one of them or raise the capacity"
        )
    draw = jax.jit(partial(sample, sampling=sampling, num_tokens=tokenizer.vocab_size))
    engine.warmup("prefill", "step")
    number = np.uint32(seed)
    jax.block_until_ready(draw(engine.logits, number, np.uint32(0)))

    begun = time.perf_counter()
    logits = jax.block_until_ready(engine.prefill([ids]))
    prefilled = time.perf_counter()
    text, tokens = TextStream(tokenizer, stream), []
    for index in range(max_tokens):
        token = draw(logits, number, np.uint32(index))
        if index + 1 < max_tokens:  # runs while the token is fetched and shown
            logits = engine.step(token)
        tokens.append(int(np.asarray(token)[0]))
        text.push(tokens[-1])
    text.finish()
    done = time.perf_counter()
    return {
        "text": text.text,
        "tokens": tokens,
        "prompt_tokens": len(ids),
        "tokens_per_second": len(tokens) / (done - prefilled),
        "prefill_tokens_per_second": len(ids) / (prefilled - begun),
        "state_bytes": engine.state_bytes,
        "without": list(without),
    }


class TextStream:
    """Token ids in, whole characters out."""

    def __init__(self, tokenizer: Tokenizer, show: Callable[[str], None] | None = None):
        self.text = ""
        self._tokenizer, self._show = tokenizer, show
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # Of a text tokenizer's ids: the last whose text is out, and those that wait for more.
        self._before: list[int] = []
        self._waiting: list[int] = []

    def push(self, token: int) -> None:
        """Takes one more token, and gives out the characters that it completes."""
        if not self._tokenizer.is_text:
            self._out(self._utf8.decode(self._tokenizer.decode_bytes([token])))
            return
        self._waiting.append(token)
        new = self._new_text()
        # A character of several tokens decodes to U+FFFD until it is whole: four bytes at most.
        if not new.endswith("\ufffd") or len(self._waiting) > 4:
            self._out(new)
            self._before, self._waiting = self._waiting, []

    def finish(self) -> None:
        """Gives out what is left: bytes of a character that never ended show as U+FFFD."""
        self._out(self._utf8.decode(b"", final=True))
        if self._waiting:
            self._out(self._new_text())
            self._waiting = []

    def _new_text(self) -> str:
        # Some tokenizers drop a space at the beginning: a token's text is what it adds to the last.
        known = self._tokenizer.decode(self._before)
        return self._tokenizer.decode(self._before + self._waiting)[len(known) :]

    def _out(self, text: str) -> None:
        if text:
            self.text += text
            if self._show is not None:
                self._show(text)
