"""A mixture of experts beside a dense layer of the same arithmetic, and beside rivals of its own.

    tools/bench experts

Forward with backward of one layer, each candidate in turn: `memtrain` (tokens sorted by expert,
products of groups), `dense` (a SwiGLU with as many hidden units as a token's experts have
together), `ragged_dot` (the same rows through `jax.lax.ragged_dot`) and `every expert` (all of
them for every token, and a mask). Outputs are compared first.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import interleaved, median_ratio, write
from flax import nnx

from memtrain.description import BuildContext
from memtrain.layers import MoE, SwiGLU
from memtrain.memory import Context
from memtrain.train.records import versions
from memtrain_kernels import assign


@dataclass(frozen=True)
class Options:
    tokens: int = 4096
    dim: int = 256
    hidden: int = 512
    num_experts: int = 16
    top_k: int = 2
    rounds: int = 5
    out: Path | None = None


def main() -> None:
    options = tyro.cli(Options)
    context = BuildContext(dim=options.dim)
    config = MoE(options.num_experts, options.top_k, hidden=options.hidden)
    layer = config.build(context, rngs=nnx.Rngs(0))
    dense = SwiGLU(options.hidden * options.top_k).build(context, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, options.tokens, options.dim))
    ctx = Context.of_documents(1, options.tokens)
    functions: dict[str, Callable[[Any, jax.Array], jax.Array]] = {
        "memtrain": lambda layer, x: layer(x, None, ctx)[0],
        "ragged_dot": by_ragged_dot,
        "every expert": by_every_expert,
        "dense": lambda layer, x: dense_of(layer, x),
    }
    modules = {name: dense if name == "dense" else layer for name in functions}
    want = np.asarray(jax.jit(functions["every expert"])(layer, x))
    for name in ("memtrain", "ragged_dot"):
        got = np.asarray(jax.jit(functions[name])(layer, x))
        np.testing.assert_allclose(got, want, atol=1e-5)
        print(f"{name} agrees with every expert")
    results: dict[str, Any] = {}
    for way in ("forward", "backward"):
        programs = {}
        for name, function in functions.items():
            run = function if way == "forward" else partial(gradient, function)
            programs[name] = partial(timed, jax.jit(run), modules[name], x)
        seconds = interleaved(programs, rounds=options.rounds, warmup=1)
        found = {f"{name} seconds": statistics.median(s) for name, s in seconds.items()}
        found |= {
            f"{name} over memtrain": median_ratio(seconds, "memtrain", name)
            for name in functions
            if name != "memtrain"
        }
        print(f"{way}: " + ", ".join(f"{n} {value:.3g}" for n, value in found.items()))
        results[way] = found
    about = {"device": jax.devices()[0].device_kind, **dataclasses.asdict(options), "out": None}
    write(options.out, "experts", {**about, "cases": results}, versions())


def gradient(function: Callable[[Any, jax.Array], jax.Array], layer: Any, x: jax.Array) -> Any:
    return jax.grad(lambda layer, x: jnp.sum(jnp.square(function(layer, x))), (0, 1))(layer, x)


def timed(program: Callable[..., Any], *arguments: Any) -> None:
    jax.block_until_ready(program(*arguments))


def dense_of(layer: Any, x: jax.Array) -> jax.Array:
    return layer(x)


def by_ragged_dot(layer: Any, x: jax.Array) -> jax.Array:
    weights, experts = layer.choose(layer.scores(x))
    way = assign(experts[0], layer.config.num_experts)
    rows = way.dispatch(x[0])
    product = lambda rows, w: jax.lax.ragged_dot(rows, w[...], way.sizes)  # noqa: E731
    hidden = jax.nn.silu(product(rows, layer.gate)) * product(rows, layer.input)
    return way.combine(product(hidden, layer.output), weights[0])[None]


def by_every_expert(layer: Any, x: jax.Array) -> jax.Array:
    weights, experts = layer.choose(layer.scores(x))
    share = jnp.zeros((*x.shape[:2], layer.config.num_experts))
    at = jnp.arange(x.shape[1])[None, :, None]
    share = share.at[0, at[0], experts[0]].set(weights[0])
    hidden = jax.nn.silu(jnp.einsum("btd,edf->betf", x, layer.gate[...]))
    hidden = hidden * jnp.einsum("btd,edf->betf", x, layer.input[...])
    return jnp.einsum("betf,efd,bte->btd", hidden, layer.output[...], share)


if __name__ == "__main__":
    main()
