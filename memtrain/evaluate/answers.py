"""Prompts answered with every memory and with each one off, and text that goes on by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np

from memtrain.data.config import RecallTask
from memtrain.data.recall import recall_examples
from memtrain.data.tokenizer import Tokenizer
from memtrain.decode.engine import Engine
from memtrain.decode.sampling import Sampling, sample
from memtrain.evaluate.subject import HeldOut, Subject


CHUNK, ROWS = 16, 4
"""Prompts are read and answered in calls of one size: a single program for each setting."""


def answer_engine(subject: Subject, without: str | None) -> Engine:
    return subject.engine(without=() if without is None else (without,), batch=ROWS, chunk=CHUNK)


@dataclass(frozen=True)
class Answered:
    """A question and what the model says in each setting."""

    prompt: str
    fact: str
    """What was told, such as "@kq=XWB"."""
    distance: int
    wanted: str
    answers: dict[str, str]


def answer_prompts(
    subject: Subject, task: RecallTask, held_out: HeldOut, engines: Mapping[str, Engine]
) -> list[Answered]:
    """One question at each of a few distances, the first to be drawn, answered greedily.

    engines: an `answer_engine` for each setting.
    """
    length = subject.experiment.train.seq_len
    prompt_len = length - task.value_len
    longest = prompt_len - (task.num_facts + 1) * (task.name_len + task.value_len + 3)
    distances = [max(16, longest * part // 8) for part in (1, 2, 4, 7)]
    examples = recall_examples(
        task,
        held_out.tokenizer,
        held_out.documents,
        distances=distances,
        examples_per_distance=1,
        prompt_len=prompt_len,
        seed=1,
    )
    count = examples.answers.shape[1]
    said = {
        name: greedy(engine, examples.prompts, count, held_out.tokenizer)
        for name, engine in engines.items()
    }
    return [
        Answered(
            prompt=held_out.tokenizer.decode(prompt),
            fact=fact,
            distance=int(distance),
            wanted=held_out.tokenizer.decode(wanted[wanted >= 0]),
            answers={name: answers[row] for name, answers in said.items()},
        )
        for row, (prompt, fact, distance, wanted) in enumerate(
            zip(examples.prompts, examples.facts, examples.distances, examples.answers, strict=True)
        )
    ]


def greedy(engine: Engine, prompts: np.ndarray, count: int, tokenizer: Tokenizer) -> list[str]:
    """`count` tokens after each prompt, the likeliest every time."""
    engine.reset()
    logits = np.asarray(engine.prefill(prompts))
    tokens = []
    for _ in range(count):
        tokens.append(logits[:, : tokenizer.vocab_size].argmax(axis=1).astype(np.int32))
        if len(tokens) < count:
            logits = np.asarray(engine.prefill(tokens[-1][:, None]))
    return [tokenizer.decode(row) for row in np.stack(tokens, axis=1)]


@dataclass(frozen=True)
class Sample:
    """A prompt from held-out text and how the model goes on."""

    name: str
    prompt: str
    text: str
    temperature: float
    seed: int


def draw_sample(
    subject: Subject,
    engine: Engine,
    held_out: HeldOut,
    *,
    num_tokens: int = 400,
    temperature: float = 0.8,
    seed: int = 0,
) -> Sample:
    """Goes on from the begin of the first document that is long enough."""
    prompt_len = min(48, subject.context // 4)
    lengths = [len(held_out.tokens(d)) for d in range(len(held_out))]
    document = next((d for d, n in enumerate(lengths) if n >= prompt_len), int(np.argmax(lengths)))
    prompt = held_out.tokens(document)[:prompt_len]
    sampling = Sampling(temperature=temperature)
    draw = jax.jit(
        lambda logits, step: sample(
            logits, np.int32(seed), step, sampling, num_tokens=held_out.tokenizer.vocab_size
        )
    )
    engine.reset()
    logits = engine.prefill(np.tile(prompt, (engine.batch, 1)))
    tokens = []
    for step in range(min(num_tokens, subject.context - len(prompt))):
        drawn = np.asarray(draw(logits, np.int32(step)))
        tokens.append(int(drawn[0]))
        # As a chunk of one token: the program is there already.
        logits = engine.prefill(drawn[:, None])
    tokenizer = held_out.tokenizer
    return Sample(
        held_out.names[document],
        tokenizer.decode(prompt),
        tokenizer.decode(tokens),
        temperature,
        seed,
    )
