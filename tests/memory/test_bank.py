"""BankMemory against a search of every key in float64: what is seen, picked, joined and trained."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import call, compiled
from flax import nnx
from memory_oracles import bank as oracle

from memtrain.description import BuildContext, Dtypes
from memtrain.memory import BankMemory, BankMemoryConfig, Context
from memtrain.memory.bank import Visible
from memtrain.parallel.config import MeshConfig


DIM, T = 12, 24
CONFIG = BankMemoryConfig(
    num_heads=4, num_kv_heads=2, head_dim=8, window=3, bank_size=9, top_k=3, join="gate"
)


def build(**changes) -> BankMemory:
    config = dataclasses.replace(CONFIG, **changes)
    memory = config.build(BuildContext(dim=DIM, dtypes=Dtypes()), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    memory.log_scale.set_value(jnp.asarray(rng.normal(1, 0.3, 4), jnp.float32))
    if config.join == "gate":
        memory.gate.set_value(jnp.asarray(rng.normal(size=4), jnp.float32))
    return memory


def parameters(memory: BankMemory) -> dict[str, np.ndarray]:
    found = {n: getattr(memory, n).weight[...] for n in ("query", "key", "value", "output")}
    found |= {n: getattr(memory, n).scale[...] for n in ("query_norm", "key_norm")}
    found["log_scale"] = memory.log_scale[...]
    if memory.bank.join == "gate":
        found["gate"] = memory.gate[...]
    return {name: np.asarray(leaf, np.float64) for name, leaf in found.items()}


def drawn() -> tuple[np.ndarray, Context, np.ndarray]:
    """One document, and two with gaps between their positions: x, context, documents."""
    rng = np.random.default_rng(0)
    positions = np.stack([np.arange(T), np.r_[np.arange(10), np.cumsum(rng.integers(1, 3, 14))]])
    documents = np.stack([np.zeros(T, int), np.r_[np.zeros(10, int), np.ones(14, int)]])
    starts = np.zeros((2, T), bool)
    starts[:, 0] = starts[1, 10] = True
    ctx = Context(
        positions=jnp.asarray(positions, jnp.int32),
        starts=jnp.asarray(starts),
        valid=jnp.ones((2, T), bool),
        want_reads=True,
        want_metrics=True,
    )
    return rng.normal(size=(2, T, DIM)).astype(np.float32), ctx, documents


def expected(memory: BankMemory, x, ctx: Context, documents, **more):
    options: dict[str, Any] = {
        "heads": 4,
        "kv_heads": 2,
        "window": 3,
        "bank_size": 9,
        "top_k": 3,
    } | more
    rows = [
        oracle(
            row.astype(np.float64),
            parameters(memory),
            np.asarray(ctx.positions[i]),
            documents[i],
            join=memory.bank.join,
            **options,
        )
        for i, row in enumerate(np.asarray(x))
    ]
    return np.stack([y for y, _ in rows]), [picked for _, picked in rows]


@pytest.mark.parametrize("join", ["gate", "softmax"])
@pytest.mark.parametrize("dtype", ["state", "int8"])
def test_reads_what_a_search_of_all_keys_reads(join, dtype):
    memory = build(join=join, bank_dtype=dtype)
    x, ctx, documents = drawn()
    y, _, aux = call(memory, jnp.asarray(x), None, ctx)
    want, picked = expected(memory, x, ctx, documents, int8=dtype == "int8")
    np.testing.assert_allclose(y, want, atol=2e-5)
    found = np.asarray(aux.reads["positions"]).reshape(2, T, 4, 3)
    named = np.asarray(aux.reads["documents"]).reshape(2, T, 4, 3)
    for b, t, h in np.ndindex(2, T, 4):
        assert [p for p in found[b, t, h] if p >= 0] == picked[b][t][h]
        assert (named[b, t, h][found[b, t, h] >= 0] == documents[b, t] + 1).all()  # counted from 1
    weights = np.asarray(aux.reads["weights"]).reshape(2, T, 4, 3).sum(axis=-1)
    assert np.allclose(weights[0, :3], 0) and (weights[0, 3:] > 0).all()
    np.testing.assert_allclose(aux.metrics["bank_share"], weights.mean(), atol=1e-6)


@pytest.mark.full
def test_a_full_ring_goes_on_and_on():
    """Three times round the ring of 12 slots, token by token and in chunks across its end."""
    memory = build()
    rng = np.random.default_rng(3)
    x = rng.normal(size=(1, 41, DIM)).astype(np.float32)
    ctx = Context.of_documents(1, 41)
    want, _ = expected(memory, x, ctx, np.zeros((1, 41), int))
    for lengths in ((1,) * 41, (8, 8, 1, 8, 8, 8), (13, 1, 13, 1, 13)):
        state, got, at = memory.init_state(1, 41), [], 0
        assert state["bank_key"].shape == (1, 12, 2, 8)
        for n in lengths:
            y, state, _ = call(
                memory, jnp.asarray(x[:, at : at + n]), state, ctx.window(at, at + n)
            )
            got.append(y)
            at += n
        np.testing.assert_allclose(np.concatenate(got, axis=1), want, atol=2e-5)
        assert not np.asarray(state["overflow"]).any()
        assert sorted(np.asarray(state["bank_position"])[0]) == list(range(29, 41))


@pytest.mark.parametrize("cut", [(24,), (8, 8, 8), (1,) * 24])
def test_ties_go_to_the_earlier_position_wherever_it_lies(cut):
    """Tokens 2, 5, 8 and 11 are alike to the bit; queries that see them all pick the first three,
    though the ring has turned and they come partly from the bank, partly from the call."""
    memory = build(bank_size=18, num_kv_heads=4)
    rng = np.random.default_rng(4)
    x = rng.normal(size=(1, T, DIM)).astype(np.float32)
    x[:, [5, 8, 11]] = x[:, 2:3]
    x[:, 17:] = x[:, 2:3]  # the query of a token like them likes them best, if it has its own key
    memory.query.weight.set_value(memory.key.weight[...])
    ctx = Context.of_documents(1, T, want_reads=True)
    state, at, found = memory.init_state(1, 21), 0, []
    if cut == (24,):
        state = None
    for n in cut:
        _, state, aux = call(memory, jnp.asarray(x[:, at : at + n]), state, ctx.window(at, at + n))
        found.append(np.asarray(aux.reads["positions"]).reshape(1, n, 4, 3))
        at += n
    picked = np.concatenate(found, axis=1)
    assert (picked[0, 17] == [2, 5, 8]).all()
    assert (picked[0, 22] == [2, 5, 8]).all()
    # 23 positions on, token 2 is beyond the bank: 23 - 2 = 21 = window + bank_size.
    assert (picked[0, 23] == [5, 8, 11]).all()


@pytest.mark.full
@pytest.mark.parametrize("trained", [0, 4])
def test_gradients_stop_where_they_should(trained):
    """By the keys' and values' weights, the loss of one query at distance: only positions less than
    `gradient_tokens` before the window move them; finite differences of the oracle agree."""
    memory = build(gradient_tokens=trained, join="softmax", bank_size=16)
    x, ctx, _ = drawn()
    x, ctx = x[:1], Context.of_documents(1, T)
    w = np.random.default_rng(5).normal(size=DIM)

    def by_inputs(x):
        return jnp.sum(memory(x, None, ctx)[0][0, -1] * w)

    g = np.asarray(compiled(jax.grad(by_inputs))(jnp.asarray(x)))[0]
    felt = np.abs(g).max(axis=-1)
    beyond = T - 1 - 3 - trained  # the last position that is a constant
    assert (felt[: beyond + 1] == 0).all()
    assert (felt[-3:] > 0).all()
    if not trained:
        return
    assert felt[beyond + 1 : T - 3].max() > 1e-3
    x64, step = x.astype(np.float64), 1e-5
    for t in range(beyond + 1, T):
        for d in range(0, DIM, 5):
            ends = []
            for sign in (1, -1):
                moved = x64.copy()
                moved[0, t, d] += sign * step
                y, _ = expected(memory, moved, ctx, np.zeros((1, T), int), bank_size=16)
                ends.append(y[0, -1] @ w)
            assert g[t, d] == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=2e-4)


def test_sink_tokens_are_not_looked_up_again():
    """Local attention sees them wherever it is: a key counts once."""
    x, ctx, _ = drawn()
    read = {}
    for sinks in (0, 2):
        _, _, aux = call(build(sink_tokens=sinks, bank_size=21), jnp.asarray(x), None, ctx)
        read[sinks] = set(np.asarray(aux.reads["positions"]).ravel().tolist())
    assert {0, 1} <= read[0]
    assert not {0, 1} & read[2] and 2 in read[2]


def test_bytes_of_the_bank():
    """65,536 + 512 slots of 8 heads of 128, keys and values in bfloat16: 258 MiB a sequence; keys
    in int8 take half of theirs and a scale."""
    dtypes = Dtypes(state="bfloat16")
    config = BankMemoryConfig(num_heads=8, head_dim=128)
    slots = 65_536 + 512
    for changes, key_bytes in (({}, 256), ({"bank_dtype": "int8"}, 128 + 4)):
        changed = dataclasses.replace(config, **changes)
        memory = nnx.eval_shape(
            lambda c=changed: c.build(BuildContext(dim=64, dtypes=dtypes), rngs=nnx.Rngs(0))
        )
        spec = memory.state_spec(1, 2**20)
        held = sum(leaf.nbytes for name, leaf in spec.items() if name.startswith("bank_"))
        assert held == slots * (8 * (key_bytes + 256) + 4 + 4) + 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bank_size": 0}, "bank_size=0"),
        ({"top_k": 10}, "top_k=10: the bank has bank_size=9"),
        ({"window": None}, "a bank begins where local attention ends"),
        ({"soft_cap": 5.0}, "soft_cap=5.0"),
        ({"gradient_tokens": 10}, "gradient_tokens=10"),
        ({"gradient_tokens": 2, "bank_dtype": "int8"}, "keys in int8 have no gradient"),
    ],
)
def test_bad_descriptions(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_a_bank_that_the_mesh_cannot_split():
    with pytest.raises(ValueError, match=r"mesh.context=8; nearest 5 or 13"):
        CONFIG.check_mesh(MeshConfig(context=8))
    CONFIG.check_mesh(MeshConfig(context=4))


def test_more_tokens_than_the_capacity_overflow():
    memory = build()
    x = np.random.default_rng(6).normal(size=(1, 8, DIM)).astype(np.float32)
    _, state, _ = call(memory, jnp.asarray(x), memory.init_state(1, 7), Context.of_documents(1, 8))
    assert np.asarray(state["overflow"]).all()


@pytest.mark.parametrize("mask", [Visible(4, 12), Visible(0, 5, sinks=3), Visible(2, 2**31 - 1, 1)])
def test_what_a_mask_says_it_reaches_is_what_it_sees(mask):
    rng = np.random.default_rng(2)
    q_least, kv_least = rng.integers(0, 30, (2, 200)).astype(np.int32)
    q_most, kv_most = (x + rng.integers(0, 6, 200).astype(np.int32) for x in (q_least, kv_least))
    said = np.asarray(mask.reaches(*map(jnp.asarray, (q_least, q_most, kv_least, kv_most))))
    seen = [
        any(
            q - kv in range(mask.first, mask.last) and kv >= mask.sinks
            for q in range(q0, q1 + 1)
            for kv in range(kv0, kv1 + 1)
        )
        for q0, q1, kv0, kv1 in zip(q_least, q_most, kv_least, kv_most, strict=True)
    ]
    assert not (np.array(seen) & ~said).any() and said.sum() < 1.1 * sum(seen) < 200
