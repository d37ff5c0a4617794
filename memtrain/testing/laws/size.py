"""Law 5: the spec's bytes are the bytes of the live arrays, known before anything is allocated."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from memtrain.description import Dtypes
from memtrain.memory.protocol import is_leaf_spec, map_spec, spec_bytes
from memtrain.testing.bench import BFLOAT16, Bench
from memtrain.testing.cases import BATCH, halves
from memtrain.testing.report import Outcome
from memtrain.testing.subject import Subject
from memtrain.testing.tolerances import Judge, named_leaves


def check(bench: Bench) -> Outcome:
    judge = Judge("bytes")
    for dtypes in (Dtypes(), BFLOAT16):
        subject = bench.subject(dtypes)
        # Made of shapes alone: a planner asks this of models that fit on no machine at hand.
        memory = jax.eval_shape(lambda d=dtypes: bench.make_memory(d, nnx.Rngs(bench.seed)))
        spec = memory.state_spec(BATCH, subject.capacity)
        empty = subject.init()
        _check_arrays(judge, f"{dtypes.state}, empty state", spec, empty)
        abstract = jax.eval_shape(lambda m, s=subject: m.init_state(BATCH, s.capacity), memory)
        _check_arrays(judge, f"{dtypes.state}, jax.eval_shape", spec, abstract)
        n = halves(bench.length)[0]
        y, state = subject.run((n,), subject.x[:, :n], subject.ctx.window(0, n))
        _check_arrays(judge, f"{dtypes.state}, after a call", spec, state)
        live = sum(leaf.nbytes for leaf in named_leaves(state).values())
        judge.require(
            live == spec_bytes(spec),
            f"{dtypes.state}, after a call",
            "all leaves",
            f"{live} bytes live where the spec says {spec_bytes(spec)}",
        )
        _check_output(judge, subject, y)
    _check_axes(judge, bench.subject())
    return judge.outcome


def _check_arrays(judge: Judge, case: str, spec: Any, state: Any) -> None:
    want = map_spec(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), spec)
    a, b = jax.tree.structure(state), jax.tree.structure(want)
    judge.require(a == b, case, "structure", f"{a} where the spec says {b}")
    for (path, leaf), said in zip(
        jax.tree_util.tree_flatten_with_path(state)[0], jax.tree.leaves(want), strict=True
    ):
        got = (tuple(leaf.shape), jnp.dtype(leaf.dtype).name)
        right = (tuple(said.shape), jnp.dtype(said.dtype).name)
        judge.require(
            got == right, case, jax.tree_util.keystr(path), f"{got} where the spec says {right}"
        )


def _check_output(judge: Judge, subject: Subject, y: Any) -> None:
    got = (y.shape, y.dtype.name)
    want = ((BATCH, halves(subject.length)[0], subject.dim), subject.dtypes.compute)
    judge.require(got == want, "one call", "output", f"{got} where {want} is right")


def _check_axes(judge: Judge, subject: Subject) -> None:
    """The batch comes first in every leaf: that is what sharding, fork and reset go by."""
    spec = subject.memory.state_spec(BATCH, subject.capacity)
    for path, leaf in jax.tree_util.tree_flatten_with_path(spec, is_leaf=is_leaf_spec)[0]:
        judge.require(
            leaf.axes[:1] == ("batch",) and leaf.shape[0] == BATCH,
            "axes",
            jax.tree_util.keystr(path),
            f"{leaf.axes} of {leaf.shape}: the first dimension must be the batch",
        )
