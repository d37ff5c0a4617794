"""Recurrences over devices: what travels is transitions, whatever the length of the sequence."""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memtrain.description import BuildContext, Dtypes
from memtrain.memory import Context, LinearRecurrence, LinearRecurrenceConfig
from memtrain.memory.protocol import Memory
from memtrain.parallel.config import MeshConfig
from memtrain.parallel.mesh import mesh_of
from memtrain.parallel.recurrence import over_stretches, stretch_order
from memtrain.parallel.sharding import constrain_tokens, kernels_over, sharding_for
from memtrain.parallel.tokens import TokenSharding
from memtrain_kernels import Layout


B, D, N = 4, 16, 8
COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)(?:-start)?\("
)


def moved(kind, length: int) -> collections.Counter:
    """(collective, result shapes) of one training call with a carried-in state, by count."""
    mesh, layout = mesh_of(MeshConfig(data=2, context=4)), Layout(kind, 4)
    build = BuildContext(dim=D, dtypes=Dtypes())
    memory = LinearRecurrenceConfig(state_dim=N, conv=3).build(build, rngs=nnx.Rngs(0))
    place = lambda a: jax.device_put(  # noqa: E731
        a, sharding_for(("batch", "time") + (None,) * (a.ndim - 2), mesh)
    )
    x = place(jnp.ones((B, length, D)))
    ctx = dataclasses.replace(jax.tree.map(place, Context.of_documents(B, length)), layout=layout)

    def loss(memory, x, state, ctx):
        y, after, _ = memory(x, state, ctx)
        return jnp.sum(constrain_tokens(y) ** 2) + jnp.sum(after["hidden"])

    state = jax.tree.map(jnp.asarray, memory.init_state(B, length))
    with kernels_over(mesh, TokenSharding(layout)):
        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        text = program.lower(memory, x, state, ctx).compile().as_text()
    assert text is not None
    shapes = re.compile(r"\w+\[[\d,]*\]")
    return collections.Counter(
        (name, tuple(shapes.findall(result))) for result, name in COLLECTIVE.findall(text)
    )


@pytest.mark.parametrize("kind", [pytest.param("contiguous", marks=pytest.mark.full), "zigzag"])
def test_what_travels_does_not_grow_with_the_sequence(kind):
    short = moved(kind, 64)
    assert any(name == "all-gather" for name, _ in short)
    assert short == moved(kind, 256)


@pytest.mark.full
def test_striped_tokens_are_exchanged_and_never_gathered():
    short, long = moved("striped", 64), moved("striped", 256)
    others = lambda found: {k: n for k, n in found.items() if k[0] != "all-to-all"}  # noqa: E731
    assert others(short) == others(long)
    assert any(name == "all-to-all" for name, _ in short)


@pytest.mark.parametrize(
    ("kind", "order"),
    [("contiguous", [0, 1, 2]), ("zigzag", [0, 5, 1, 4, 2, 3])],
)
def test_the_order_of_stretches(kind, order):
    np.testing.assert_array_equal(stretch_order(Layout(kind, 3)), order)


class CalledAgain(LinearRecurrence):
    """Every stretch is a whole call, after its transition."""

    def __call__(self, x, state, ctx):
        if ctx.layout.devices > 1:
            return over_stretches(self, x, state, ctx)
        y, state, aux = super().__call__(x, state, ctx)
        reads = {"slots": jnp.cumsum(jnp.ones_like(ctx.positions), axis=1)[..., None]}
        return y, state, dataclasses.replace(aux, metrics={"mean": y.mean()}, reads=reads)


@pytest.mark.parametrize("layout", [Layout("zigzag", 2), Layout("striped", 4)], ids=str)
def test_a_memory_that_is_not_cut_in_halves_gives_the_serial_results(layout):
    config, build = LinearRecurrenceConfig(state_dim=N, conv=3), BuildContext(dim=D)
    memory = CalledAgain(config, build, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(B, 16, D)), jnp.float32)
    ctx = Context.of_documents(B, 16)
    ctx = dataclasses.replace(ctx, starts=jnp.asarray(rng.random((B, 16)) < 0.2))
    carried = jax.tree.map(jnp.ones_like, memory.init_state(B, 16))
    there = dataclasses.replace(ctx, layout=layout, starts=layout.arrange(ctx.starts))
    call = jax.jit(lambda m, x, state, ctx: m(x, state, ctx))
    y, state, _ = call(memory, x, carried, ctx)
    got, got_state, aux = call(memory, layout.arrange(x), carried, there)
    np.testing.assert_allclose(layout.restore(got), y, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got_state, state)
    np.testing.assert_allclose(aux.metrics["mean"], y.mean(), atol=1e-5)
    stretch = 16 // (layout.devices * layout.pieces)
    slots = layout.restore(np.asarray(aux.reads["slots"]))[..., 0]
    np.testing.assert_array_equal(slots, np.tile(np.arange(stretch) + 1, (B, 16 // stretch)))


class LossOfItsOwn(CalledAgain):
    """Reports a loss of each stretch."""

    def __call__(self, x, state, ctx):
        y, state, aux = super().__call__(x, state, ctx)
        return y, state, dataclasses.replace(aux, losses={"own": y.sum()})


def test_losses_of_stretches_are_refused():
    memory = LossOfItsOwn(LinearRecurrenceConfig(), BuildContext(dim=D), rngs=nnx.Rngs(0))
    ctx = dataclasses.replace(Context.of_documents(B, 16), layout=Layout("contiguous", 2))
    with pytest.raises(ValueError, match=r"LossOfItsOwn reports losses \['own'\]"):
        jax.eval_shape(lambda x: memory(x, None, ctx)[0], jnp.ones((B, 16, D)))


class NoTransitions(Memory):
    """A memory that offers none."""


def test_a_memory_without_transitions_is_refused():
    ctx = dataclasses.replace(Context.of_documents(1, 4), layout=Layout("contiguous", 2))
    with pytest.raises(ValueError, match="NoTransitions offers no transitions"):
        over_stretches(NoTransitions(), jnp.ones((1, 4, 2)), None, ctx)
