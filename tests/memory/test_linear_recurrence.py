"""LinearRecurrence against a loop over tokens in float64, whole, in pieces and over stretches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import call, compiled
from flax import nnx
from memory_oracles import linear_recurrence as oracle

from memtrain.description import BuildContext, Dtypes
from memtrain.memory import Context, LinearRecurrence, LinearRecurrenceConfig, spec_bytes
from memtrain_kernels import Layout


DIM, CHANNELS, T = 6, 5, 16


def build(conv: int | None = 3, **dtypes) -> LinearRecurrence:
    config = LinearRecurrenceConfig(state_dim=CHANNELS, conv=conv, min_decay=0.2, max_decay=0.95)
    return config.build(BuildContext(dim=DIM, dtypes=Dtypes(**dtypes)), rngs=nnx.Rngs(0))


def packed() -> tuple[Context, np.ndarray]:
    """Two rows: documents with padding on both sides, and one that is full."""
    documents = np.array([[-1, -1] + [0] * 3 + [1] + [2] * 8 + [-1] * 2, [0] * T])
    starts = np.diff(documents, axis=1, prepend=-1) > 0
    positions = np.array([[0, 0, 0, 1, 2, 0, *range(8), 0, 0], range(T)], np.int32)
    return Context(positions, starts, documents >= 0), documents  # type: ignore[arg-type]


def inputs() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, T, DIM)).astype(np.float32)


def expected(
    memory: LinearRecurrence, x: np.ndarray, documents: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [2, T, D], and what is remembered at the end of each row [2, N]."""
    weights = {
        name: np.asarray(getattr(memory, name).weight[...], np.float64)
        for name in ("decay", "value", "gate", "output")
    }
    weights["rate"] = np.asarray(memory.rate[...], np.float64)
    if memory.config.conv is not None:
        weights["taps"] = np.asarray(memory.conv.taps[...], np.float64)
    rows = [oracle(x[r].astype(np.float64), weights, documents[r]) for r in range(2)]
    return np.stack([y for y, _ in rows]), np.stack([h for _, h in rows])


@pytest.mark.parametrize("conv", [None, 3])
def test_whole_and_in_pieces_equal_the_loop(conv):
    memory, x = build(conv), inputs()
    ctx, documents = packed()
    want, last = expected(memory, x, documents)
    valid = documents >= 0
    y, none, _ = call(memory, x, None, ctx)
    assert none is None
    np.testing.assert_allclose(np.asarray(y)[valid], want[valid], atol=2e-6)

    state, at = compiled(lambda m: m.init_state(2, T))(memory), 0
    for n in (1, 3, 8, 1, 3):
        y, state, _ = call(memory, x[:, at : at + n], state, ctx.window(at, at + n))
        part = valid[:, at : at + n]
        got, wanted = np.asarray(y)[part], want[:, at : at + n][part]
        np.testing.assert_allclose(got, wanted, atol=2e-6, err_msg=f"token {at}")
        at += n
    np.testing.assert_allclose(state["hidden"], last, atol=2e-6)


@pytest.mark.parametrize("layout", [Layout("zigzag", 4), Layout("striped", 4)], ids=str)
def test_stretches_shorter_than_the_convolution_equal_the_loop(layout):
    """On one device: the arithmetic of stretches needs no mesh."""
    memory, x = build(4), inputs()
    ctx, documents = packed()
    want, last = expected(memory, x, documents)
    there = dataclasses.replace(
        ctx,
        layout=layout,
        **{n: layout.arrange(getattr(ctx, n)) for n in ("positions", "starts", "valid")},
    )
    state = compiled(lambda m: m.init_state(2, T))(memory)
    y, state, _ = call(memory, layout.arrange(x), state, there)
    y = layout.restore(np.asarray(y))
    np.testing.assert_allclose(y[documents >= 0], want[documents >= 0], atol=2e-6)
    np.testing.assert_allclose(state["hidden"], last, atol=2e-6)
    np.testing.assert_array_equal(state["conv"]["input"][0], x[0, 11:14])
    np.testing.assert_array_equal(state["conv"]["document"][0], [3, 3, 3])


def test_a_transition_is_the_product_and_the_sum_of_its_run():
    """By hand: a document that begins in the run keeps nothing; one that goes on keeps the rest."""
    memory, x = build(None), inputs()
    ctx, _ = packed()
    transition = compiled(lambda m, x, ctx: m.transition(x, ctx, None))
    first = transition(memory, x[:, :8], ctx.window(0, 8))
    then = transition(memory, x[:, 8:], ctx.window(8, 16))
    weight = np.asarray(memory.decay.weight[...], np.float64)
    gate = 1 / (1 + np.exp(-(x.astype(np.float64) @ weight)))
    decay = np.exp(-8 * gate * np.log1p(np.exp(np.asarray(memory.rate[...], np.float64))))
    np.testing.assert_array_equal(first["kept"], np.zeros((2, CHANNELS)))
    kept = np.stack([decay[0, 8:14].prod(axis=0), decay[1, 8:].prod(axis=0)])
    np.testing.assert_allclose(then["kept"], kept, rtol=1e-5)
    both = memory.compose(first, then)
    np.testing.assert_array_equal(both["kept"], np.zeros((2, CHANNELS)))
    np.testing.assert_allclose(both["sum"], then["kept"] * first["sum"] + then["sum"], atol=1e-6)


def test_the_state_has_one_size_and_stays_float32():
    memory = build(3, state="bfloat16", compute="bfloat16", matmul="bfloat16")
    spec = memory.state_spec(2, 10)
    assert spec_bytes(spec) == spec_bytes(memory.state_spec(2, 10**6))
    assert spec_bytes(spec) == 2 * (CHANNELS * 4 + 2 * DIM * 2 + 2 * 4 + 4)
    assert spec["hidden"].dtype == np.float32


def test_channels_start_between_the_decays_that_were_asked_for():
    config = LinearRecurrenceConfig(state_dim=500, conv=None)
    memory = config.build(BuildContext(dim=2, dtypes=Dtypes()), rngs=nnx.Rngs(0))
    decay = np.exp(-8 * np.log1p(np.exp(np.asarray(memory.rate[...], np.float64))))
    assert 0.9 <= decay.min() < 0.905 and 0.994 < decay.max() <= 0.999


def test_gradients_stay_finite_where_gates_close_and_open_fully():
    memory, ctx = build(None), Context.of_documents(2, T)
    loss = lambda m, x: (m(x, None, ctx)[0] ** 2).sum()  # noqa: E731
    gradients = compiled(jax.grad(loss, argnums=(0, 1)))(memory, 1e4 * inputs())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="conv=1: it takes 2 or more"):
        LinearRecurrenceConfig(conv=1)
    with pytest.raises(ValueError, match=r"min_decay=0.9, max_decay=0.5.*0 < min_decay <="):
        LinearRecurrenceConfig(max_decay=0.5)
    ctx = dataclasses.replace(Context.of_documents(2, T), layout=Layout("zigzag", 3))
    with pytest.raises(ValueError, match="multiples of 6; nearest 12 or 18"):
        build()(jnp.asarray(inputs()), None, ctx)
