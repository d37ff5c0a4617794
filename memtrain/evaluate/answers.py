"""Prompts answered with every memory and with each one off, and text that goes on by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from memtrain.data.config import RecallTask
from memtrain.data.tasks.recall import RecallExamples, line_bytes, recall_examples
from memtrain.data.tokenizer import Tokenizer
from memtrain.decode.engine import Engine
from memtrain.decode.sampling import Sampling, sample
from memtrain.evaluate.subject import HeldOut, Subject


DISTANCES = (1, 2, 4, 7)
"""Of the questions, in eighths of the longest that a row has room for."""
CHUNK = 16
"""Prompts are read and answered in calls of one size: a single program for each setting."""


def answer_engine(subject: Subject, without: Sequence[str]) -> Engine:
    """What `greedy` and `draw_sample` take."""
    return subject.engine(without=without, batch=len(DISTANCES), chunk=CHUNK)


@dataclass(frozen=True)
class Answered:
    """A question and what the model says in each setting."""

    prompt: str
    fact: str
    """What was told, such as "@kq=XWB"."""
    distance: int
    wanted: str
    answers: dict[str, str]


def draw_prompts(subject: Subject, task: RecallTask, held_out: HeldOut) -> RecallExamples:
    """One question at each of a few distances, the first to be drawn, in rows as in training."""
    prompt_len = subject.experiment.train.seq_len - task.value_len
    longest = prompt_len - (task.num_facts + 1) * line_bytes(task)
    return recall_examples(
        task,
        held_out.tokenizer,
        held_out.documents,
        distances=[max(16, longest * part // 8) for part in DISTANCES],
        examples_per_distance=1,
        prompt_len=prompt_len,
        seed=1,
    )


def answered(
    examples: RecallExamples, said: Mapping[str, Sequence[str]], tokenizer: Tokenizer
) -> list[Answered]:
    """The questions with what was said in each setting."""
    return [
        Answered(
            prompt=tokenizer.decode(examples.prompts[row]),
            fact=examples.facts[row],
            distance=int(examples.distances[row]),
            wanted=tokenizer.decode(examples.answers[row][examples.answers[row] >= 0]),
            answers={name: answers[row] for name, answers in said.items()},
        )
        for row in range(len(examples.facts))
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
    num_ids = held_out.tokenizer.vocab_size

    @jax.jit
    def draw(logits: jax.Array, seed: jax.Array, step: jax.Array) -> jax.Array:
        return sample(logits, seed, step, sampling, num_tokens=num_ids)

    engine.reset()
    logits = engine.prefill(np.tile(prompt, (engine.batch, 1)))
    tokens = []
    for step in range(min(num_tokens, subject.context - len(prompt))):
        drawn = np.asarray(draw(logits, jnp.int32(seed), jnp.int32(step)))
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
