"""Law 8: saved, restored and gone on, bit for bit as if never stopped."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx

from memtrain.testing.bench import BFLOAT16, Bench
from memtrain.testing.cases import halves
from memtrain.testing.report import Outcome
from memtrain.testing.subject import Subject
from memtrain.testing.tolerances import Judge


def check(bench: Bench) -> Outcome:
    judge = Judge("save_restore")
    for subject in (bench.subject(), bench.subject(BFLOAT16)):
        first, second = halves(bench.length)
        x, ctx = subject.x, subject.ctx
        _, state = subject.run((first,), x[:, :first], ctx.window(0, first))
        rest = x[:, first:], ctx.window(first, bench.length)
        want, want_state = subject.run((second,), *rest, state)
        restored, memory = _through_bytes(state), _rebuilt(subject)
        own, subject.memory = subject.memory, memory
        try:
            got, got_state = subject.run((second,), *rest, restored)
        finally:
            subject.memory = own
        case = f"{subject.dtypes.state}, stopped after {first} tokens"
        judge.same_bits(case, got, want)
        judge.same_bits(case + ", final state", got_state, want_state)
    return judge.outcome


def _through_bytes(tree: Any) -> Any:
    """What a file keeps of a tree: of each leaf its dtype, shape and bytes."""
    leaves, structure = jax.tree.flatten(tree)
    saved = [(leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in leaves]
    restored = [np.frombuffer(data, dtype).reshape(shape) for dtype, shape, data in saved]
    return jax.tree.unflatten(structure, jax.device_put(restored))


def _rebuilt(subject: Subject) -> Any:
    """The memory as a new process has it: built from another seed, then given the saved parameters.

    What the old one remembers outside its parameters and its state is gone.
    """
    memory = subject.make_memory(subject.dtypes, nnx.Rngs(subject.seed + 1))
    structure = jax.tree.structure(memory)
    return jax.tree.unflatten(structure, jax.tree.leaves(_through_bytes(subject.memory)))
