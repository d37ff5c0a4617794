"""Attention against a dense loop in float64, and its cache slot by slot."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import call, compiled
from flax import nnx
from memory_oracles import attention as oracle

from memtrain.description import BuildContext, Dtypes
from memtrain.memory import Attention, AttentionConfig, Context, spec_bytes


CONFIGS = {
    "full": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6),
    "mqa-capped": AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=4, soft_cap=2.0),
    "no-rope-no-norm": AttentionConfig(num_heads=2, rope_theta=None, qk_norm=False),
    "window": AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4, window=4),
    "window-sinks": AttentionConfig(num_heads=2, head_dim=4, window=3, sink_tokens=2),
    "key-conv": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, key_conv=3),
    "gated, partly rotated": AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=6, rotary_dim=4, output_gate=True
    ),
    "window-key-conv": AttentionConfig(num_heads=2, head_dim=4, window=3, key_conv=2),
}
DIM = 12
T = 24


def build(config: AttentionConfig, **dtypes) -> Attention:
    memory = config.build(BuildContext(dim=DIM, dtypes=Dtypes(**dtypes)), rngs=nnx.Rngs(0))
    if config.qk_norm:
        rng = np.random.default_rng(1)
        for norm in (memory.query_norm, memory.key_norm):
            scale = jnp.asarray(rng.uniform(0.5, 1.5, norm.scale.shape), jnp.float32)
            norm.scale.set_value(scale)
    return memory


def init(memory: Attention, batch: int, capacity: int):
    return compiled(lambda m: m.init_state(batch, capacity))(memory)


def parameters(memory: Attention) -> dict[str, np.ndarray]:
    out = {
        name: np.asarray(getattr(memory, name).weight[...], np.float64)
        for name in ("query", "key", "value", "output")
    }
    if memory.config.key_conv is not None:
        out["key_conv"] = np.asarray(memory.key_conv.taps[...], np.float64)
    if memory.config.output_gate:
        out["output_gate"] = np.asarray(memory.output_gate.weight[...], np.float64)
    if memory.config.qk_norm:
        out["query_norm"] = np.asarray(memory.query_norm.scale[...], np.float64)
        out["key_norm"] = np.asarray(memory.key_norm.scale[...], np.float64)
    return out


def packed(rows: list[list[int]], offset: int = 0) -> tuple[Context, np.ndarray]:
    """Each row: documents of these lengths, then padding. Positions start at `offset`."""
    positions = np.zeros((len(rows), T), np.int32)
    documents = np.full((len(rows), T), -1, np.int32)
    starts = np.zeros((len(rows), T), bool)
    for r, lengths in enumerate(rows):
        at = 0
        for number, n in enumerate(lengths):
            positions[r, at : at + n] = np.arange(n) + offset
            documents[r, at : at + n] = number
            starts[r, at] = True
            at += n
    # On the host: slices of device arrays would each be compiled.
    return Context(positions, starts, documents >= 0), documents  # type: ignore[arg-type]


def wanted(memory: Attention, x: np.ndarray, ctx: Context, documents: np.ndarray) -> np.ndarray:
    config = memory.config
    return np.stack(
        [
            oracle(
                np.asarray(x[r], np.float64),
                parameters(memory),
                np.asarray(ctx.positions[r]),
                documents[r],
                heads=memory.num_heads,
                kv_heads=memory.num_kv_heads,
                window=config.window,
                sinks=config.sink_tokens,
                theta=config.rope_theta,
                rotary_dim=config.rotary_dim,
                soft_cap=config.soft_cap,
            )
            for r in range(len(x))
        ]
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_and_cached_equal_the_dense_oracle(name):
    memory = build(CONFIGS[name])
    ctx, documents = packed([[T], [3, 9, 1, 7]])
    x = np.random.default_rng(0).normal(size=(2, T, DIM)).astype(np.float32)
    want = wanted(memory, x, ctx, documents)
    y, none, _ = call(memory, x, None, ctx)
    assert none is None
    np.testing.assert_allclose(y, want, atol=2e-5)

    state, at = init(memory, 2, T), 0
    for n in (8, 8, 1, 1, 1, 1, 1, 1, 1, 1):
        y, state, _ = call(memory, x[:, at : at + n], state, ctx.window(at, at + n))
        np.testing.assert_allclose(y, want[:, at : at + n], atol=2e-5, err_msg=f"token {at}")
        at += n


def test_induction_heads_look_at_what_followed_their_like():
    """Tokens of random unit vectors, some of which come again: no training, no positions."""
    config = AttentionConfig(
        num_heads=1, head_dim=64, rope_theta=None, key_conv=2, induction_init=True
    )
    memory = config.build(BuildContext(dim=64), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    words = rng.normal(size=(12, 64))
    text = [*range(12), 3, 4, 5, 9]
    p = parameters(memory)
    p |= {"value": np.eye(64), "output": np.eye(64)}
    positions, documents = np.arange(16), np.zeros(16, int)
    read = oracle(words[text], p, positions, documents, heads=1, kv_heads=1, theta=None)
    for t in range(12, 16):
        nearest = int(np.argmax(words @ read[t]))
        assert nearest == text[t] + 1, f"token {t}, a second {text[t]}, looks at {nearest}"


def test_grouped_induction_heads_share_the_first_query_of_their_group():
    config = AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=6, key_conv=3, induction_init=True
    )
    memory = config.build(BuildContext(dim=DIM), rngs=nnx.Rngs(0))
    query = np.asarray(memory.query.weight[...]).reshape(DIM, 4, 6)
    key = np.asarray(memory.key.weight[...]).reshape(DIM, 2, 6)
    np.testing.assert_array_equal(key, query[:, [0, 2]])
    taps = np.asarray(memory.key_conv.taps[...])
    np.testing.assert_array_equal(taps, np.array([[0.0], [1.0], [0.0]]) * np.ones((1, 12)))


@pytest.mark.parametrize("name", ["window-sinks", "key-conv"])
def test_taking_nothing_back_is_nothing(name):
    memory = build(CONFIGS[name])
    ctx, _ = packed([[9]])
    x = np.random.default_rng(0).normal(size=(1, T, DIM)).astype(np.float32)
    _, state, _ = call(memory, x[:, :8], init(memory, 1, T), ctx.window(0, 8))
    back = memory.rollback(state, 0)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, back, state)
    with pytest.raises(ValueError, match="has overwritten"):
        memory.rollback(state, 1)


def test_induction_needs_its_shift():
    with pytest.raises(ValueError, match="induction_init needs key_conv"):
        AttentionConfig(induction_init=True)


def test_gradients_equal_finite_differences_of_the_oracle():
    memory = build(CONFIGS["window-sinks"])
    ctx, documents = packed([[5, 14]])
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, T, DIM)).astype(np.float32)
    w = rng.normal(size=(1, T, DIM)) * (documents >= 0)[..., None]
    gradient = compiled(jax.grad(lambda m, x: jnp.sum(m(x, None, ctx)[0] * w), argnums=(0, 1)))(
        memory, x
    )
    exact = parameters(memory)

    def loss(name: str, delta: np.ndarray) -> float:
        p = dict(exact)
        row = np.asarray(x[0], np.float64)
        if name == "x":
            row = row + delta
        else:
            p[name] = p[name] + delta
        y = oracle(
            row,
            p,
            np.asarray(ctx.positions[0]),
            documents[0],
            heads=2,
            kv_heads=2,
            window=3,
            sinks=2,
        )
        return float(np.sum(y * w[0]))

    found = {
        name: getattr(gradient[0], name).weight[...] for name in ("query", "key", "value", "output")
    }
    found |= {name: getattr(gradient[0], name).scale[...] for name in ("query_norm", "key_norm")}
    found["x"] = gradient[1][0]
    for name, g in found.items():
        direction = rng.normal(size=g.shape)
        slope = (loss(name, 1e-5 * direction) - loss(name, -1e-5 * direction)) / 2e-5
        assert np.vdot(np.asarray(g, np.float64), direction) == pytest.approx(
            slope, rel=2e-4, abs=2e-4
        )


def test_far_positions_answer_like_near_ones():
    memory = build(CONFIGS["window"])
    x = np.random.default_rng(0).normal(size=(1, T, DIM)).astype(np.float32)
    near, _ = packed([[T]])
    far, _ = packed([[T]], offset=2**31 - 1 - T)
    a, b = call(memory, x, None, near)[0], call(memory, x, None, far)[0]
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_the_ring_has_one_size_and_holds_the_newest_tokens():
    memory = build(CONFIGS["window-sinks"])
    assert spec_bytes(memory.state_spec(2, 1_000)) == spec_bytes(memory.state_spec(2, 100_000))
    ctx, _ = packed([[T]])
    x = np.random.default_rng(0).normal(size=(1, T, DIM)).astype(np.float32)
    _, state, _ = call(memory, x, init(memory, 1, 100), ctx)
    assert sorted(state["position"][0].tolist()) == [T - 3, T - 2, T - 1]
    assert state["sink_position"][0].tolist() == [0, 1]
    assert state["length"].tolist() == [T - 2]
    assert not state["overflow"].any()


def test_sinks_are_those_of_the_current_document():
    memory = build(CONFIGS["window-sinks"])
    ctx, _ = packed([[9, 1]])
    x = np.random.default_rng(0).normal(size=(1, T, DIM)).astype(np.float32)
    _, state, _ = call(memory, x, init(memory, 1, 100), ctx)
    assert state is not None
    assert state["current_document"].tolist() == [2]
    assert state["sink_document"][0].tolist() == [2, -1]


@pytest.mark.parametrize("name", ["full", "window"])
def test_past_the_capacity_nothing_is_overwritten(name):
    memory = build(CONFIGS[name])
    capacity = 3  # below the window too: there the ring is as short as the capacity
    ctx, _ = packed([[T]])
    x = np.random.default_rng(0).normal(size=(1, T, DIM)).astype(np.float32)
    state = init(memory, 1, capacity)
    _, full, _ = call(memory, x[:, :3], state, ctx.window(0, 3))
    assert not full["overflow"].any()
    _, past, _ = call(memory, x[:, 3:8], full, ctx.window(3, 8))
    assert past["overflow"].all()
    for leaf in ("key", "value", "position", "document"):
        np.testing.assert_array_equal(past[leaf], full[leaf])
    nothing = dataclasses.replace(ctx.window(0, 1), valid=np.zeros((1, 1), bool))  # type: ignore[arg-type]
    _, padded, _ = call(memory, x[:, :1], past, nothing)
    assert padded["overflow"].all()
    emptied = compiled(lambda m, s: m.reset(s, jnp.asarray([True]), capacity))(memory, past)
    assert not emptied["overflow"].any() and (emptied["document"] == -1).all()


def test_rollback_restores_the_bits_and_the_document():
    memory = build(CONFIGS["full"])
    ctx, _ = packed([[4, 6]])
    x = np.random.default_rng(0).normal(size=(1, T, DIM)).astype(np.float32)
    _, before, _ = call(memory, x[:, :3], init(memory, 1, T), ctx.window(0, 3))
    _, after, _ = call(memory, x[:, 3:8], before, ctx.window(3, 8))
    for tokens, want in ((5, before), (8, init(memory, 1, T))):
        back = compiled(lambda m, s, n=tokens: m.rollback(s, n))(memory, after)
        jax.tree.map(np.testing.assert_array_equal, back, want)
    window = build(CONFIGS["window"])
    with pytest.raises(ValueError, match="ring buffer has overwritten"):
        window.rollback(init(window, 1, T), 1)


def test_the_cache_is_in_the_state_dtype_whatever_the_activations():
    memory = build(CONFIGS["full"], state="bfloat16")
    ctx, documents = packed([[T]])
    x = np.random.default_rng(0).normal(size=(1, T, DIM)).astype(np.float32)
    y, state, _ = call(memory, x, init(memory, 1, T), ctx)
    assert state["key"].dtype == state["value"].dtype == jnp.bfloat16
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, wanted(memory, x, ctx, documents), atol=2e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 4, "num_kv_heads": 3}, "not a multiple of 3 kv heads"),
        ({"window": 0}, "at least its own position"),
        ({"sink_tokens": 2}, "sink_tokens needs a window"),
    ],
)
def test_impossible_descriptions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionConfig(**options)
