"""ProductKeyMemory against a search of every slot in float64."""

import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import call, compiled
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from memory_oracles import product_key as oracle

from memtrain.description import BuildContext, Dtypes
from memtrain.memory import Context, ProductKeyMemory, ProductKeyMemoryConfig
from memtrain_kernels import partitioned, tables_over


CONFIG = ProductKeyMemoryConfig(num_slots=49, num_heads=2, top_k=3, key_dim=8, value_dim=10)
DIM = 12


def build(config: ProductKeyMemoryConfig = CONFIG) -> ProductKeyMemory:
    return config.build(BuildContext(dim=DIM, dtypes=Dtypes()), rngs=nnx.Rngs(0))


def parameters(memory: ProductKeyMemory) -> dict[str, np.ndarray]:
    out = {n: getattr(memory, n).weight[...] for n in ("query", "gate", "output")}
    out["keys"] = memory.keys[...]
    if memory.config.qk_norm:
        out["log_temperature"] = memory.log_temperature[...]
    return {name: np.asarray(leaf, np.float64) for name, leaf in out.items()}


@pytest.fixture
def drawn() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(2, 9, DIM)).astype(np.float32),
        rng.normal(size=(49, 10)).astype(np.float32),
    )


@pytest.mark.parametrize("qk_norm", [True, False])
def test_reads_what_a_search_of_all_slots_reads(drawn, qk_norm):
    x, table = drawn
    config = ProductKeyMemoryConfig(
        num_slots=49, num_heads=2, top_k=3, key_dim=8, value_dim=10, qk_norm=qk_norm
    )
    memory = build(config)
    if qk_norm:
        memory.log_temperature.set_value(jnp.asarray([0.3, 1.1]))
    ctx = Context.of_documents(2, 9, tables={"memory": jnp.asarray(table)}, want_reads=True)
    y, state, aux = call(memory, jnp.asarray(x), None, ctx)
    assert state is None
    want, slots, weights = oracle(
        x.reshape(18, DIM).astype(np.float64),
        parameters(memory),
        table.astype(np.float64),
        heads=2,
        top_k=3,
        qk_norm=qk_norm,
    )
    np.testing.assert_array_equal(aux.reads["slots"], slots.reshape(2, 9, 6))
    np.testing.assert_allclose(aux.reads["weights"], weights.reshape(2, 9, 6), atol=1e-5)
    np.testing.assert_allclose(y, want.reshape(2, 9, DIM), atol=1e-5)


def test_gradients_equal_finite_differences_of_the_search(drawn):
    x, table = drawn
    memory = build()
    rng = np.random.default_rng(1)
    w = rng.normal(size=x.shape)

    def loss(memory, x, table):
        ctx = Context.of_documents(2, 9, tables={"memory": table})
        return jnp.sum(memory(x, None, ctx)[0] * w)

    by_memory, by_x, by_table = compiled(jax.grad(loss, argnums=(0, 1, 2)))(
        memory, jnp.asarray(x), jnp.asarray(table)
    )
    found = {n: getattr(by_memory, n).weight[...] for n in ("query", "gate", "output")}
    found |= {"keys": by_memory.keys[...], "log_temperature": by_memory.log_temperature[...]}
    found |= {"x": by_x.reshape(18, DIM), "table": by_table}
    exact = parameters(memory) | {
        "x": x.reshape(18, DIM).astype(np.float64),
        "table": table.astype(np.float64),
    }

    def exact_loss(name: str, delta: np.ndarray) -> float:
        p = exact | {name: exact[name] + delta}
        y, _, _ = oracle(p.pop("x"), p, p.pop("table"), heads=2, top_k=3)
        return float(np.sum(y * w.reshape(18, DIM)))

    for name, g in found.items():
        direction = rng.normal(size=g.shape)
        slope = (exact_loss(name, 1e-6 * direction) - exact_loss(name, -1e-6 * direction)) / 2e-6
        got = np.vdot(np.asarray(g, np.float64), direction)
        assert got == pytest.approx(slope, rel=1e-3, abs=1e-3), name


def test_rows_that_are_not_read_have_no_gradient(drawn):
    x, table = drawn
    memory = build()
    ctx = Context.of_documents(2, 9, tables={"memory": jnp.asarray(table)}, want_reads=True)
    _, _, aux = call(memory, jnp.asarray(x), None, ctx)

    def loss(table):
        return memory(jnp.asarray(x), None, Context.of_documents(2, 9, tables={"memory": table}))[
            0
        ].sum()

    touched = np.flatnonzero(np.abs(compiled(jax.grad(loss))(jnp.asarray(table))).max(axis=1))
    assert touched.tolist() == np.unique(aux.reads["slots"]).tolist()


def test_usage_counts_the_valid_tokens_alone(drawn):
    x, table = drawn
    memory = build()
    valid = np.arange(9) < np.array([[5], [9]])
    plain = Context.of_documents(2, 9, tables={"memory": jnp.asarray(table)})
    ctx = Context(
        plain.positions, plain.starts, jnp.asarray(valid), tables=plain.tables, want_metrics=True
    )
    _, _, aux = call(memory, jnp.asarray(x), None, ctx)
    _, slots, weights = oracle(
        x.reshape(18, DIM).astype(np.float64),
        parameters(memory),
        table.astype(np.float64),
        heads=2,
        top_k=3,
    )
    mass = np.zeros(49)
    for m in np.flatnonzero(valid.reshape(-1)):
        for slot, weight in zip(slots[m].ravel(), weights[m].ravel(), strict=True):
            mass[slot] += weight
    share = mass[mass > 0] / mass.sum()
    assert float(aux.metrics["slots_used"]) == pytest.approx(np.mean(mass > 0))
    kl = np.sum(share * np.log(share * 49))
    assert float(aux.metrics["usage_kl"]) == pytest.approx(kl, rel=1e-5)


def test_two_layers_share_one_table(drawn):
    """Both gradients arrive at the one array."""
    x, table = drawn
    first, second = build(), CONFIG.build(BuildContext(dim=DIM), rngs=nnx.Rngs(1))

    def loss(table, which):
        ctx = Context.of_documents(2, 9, tables={"memory": table})
        return sum(m(jnp.asarray(x), None, ctx)[0].sum() for m in which)

    by_table = compiled(jax.grad(loss))
    gradient = lambda *which: by_table(jnp.asarray(table), which)  # noqa: E731
    np.testing.assert_allclose(
        gradient(first, second), gradient(first) + gradient(second), atol=1e-5
    )


def test_margin_is_the_gap_behind_the_top_k(drawn):
    x, table = drawn
    memory = build()
    got = compiled(lambda memory, x: memory.selection_margin(x, None, None))(memory, jnp.asarray(x))
    _, _, weights = oracle(
        x.reshape(18, DIM).astype(np.float64),
        parameters(memory),
        table.astype(np.float64),
        heads=2,
        top_k=4,
    )
    # Softmax keeps differences: the gap is the log of a ratio of weights.
    gap = np.log(weights[..., 2] / weights[..., 3]).min(axis=1)
    np.testing.assert_allclose(got.reshape(-1), gap, atol=1e-5)


def test_a_missing_table_is_named():
    with pytest.raises(KeyError, match="no table 'memory'"):
        build()(jnp.zeros((1, 1, DIM)), None, Context.of_documents(1, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slots": 50}, "num_slots=50 must be a square; nearest 49 or 64"),
        ({"num_slots": 49, "top_k": 8}, "top_k=8 must be between 1 and"),
        ({"key_dim": 7}, "key_dim=7 must be even"),
    ],
)
def test_impossible_descriptions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ProductKeyMemoryConfig(**options)


MESH = {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}
BIG = ProductKeyMemoryConfig(num_slots=64 * 64, num_heads=2, top_k=4, key_dim=8, value_dim=24)


def value_and_gradients(memory, x, table):
    """(aux, y) and the gradients of every parameter, the input and the table."""

    def loss(memory, x, table):
        ctx = Context.of_documents(*x.shape[:2], tables={"memory": table}, want_metrics=True)
        y, _, aux = memory(x, None, ctx)
        return jnp.sum(jnp.sin(y)), (aux, y)

    (_, found), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(
        memory, x, table
    )
    return found, gradients


def assert_alike(ours, theirs, tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        bound = tolerance * max(1.0, float(np.abs(b).max()))
        np.testing.assert_allclose(a, b, rtol=0, atol=bound)


@pytest.mark.full
@pytest.mark.parametrize("chunked", [False, True])
def test_a_sharded_table_is_read_where_it_lies(chunked, monkeypatch):
    """Nothing as large as the scores or the table of all devices is gathered."""
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    B, T = 4, 32
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(*MESH.values()), tuple(MESH))
    memory = build(BIG)
    x = jax.random.normal(jax.random.key(0), (B, T, DIM))
    table = jax.random.normal(jax.random.key(1), (BIG.num_slots, BIG.value_dim))
    want = compiled(value_and_gradients)(memory, x, table)
    if chunked:  # 5 tokens of each device's 16, in 2 rows
        module = sys.modules["memtrain_kernels.lookup.product_key_lookup"]
        monkeypatch.setattr(module, "SCORE_BYTES", 5 * 2 * (BIG.num_heads * 64 * 4))

    def told(*arguments):
        tokens = partitioned(mesh, batch=("data", "fsdp"), heads=("tensor",), sequence="context")
        with tokens, tables_over(rows=("fsdp", "context"), columns=("tensor",)):
            return value_and_gradients(*arguments)

    x = jax.device_put(x, NamedSharding(mesh, P("fsdp", "context")))
    table = jax.device_put(table, NamedSharding(mesh, P(("fsdp", "context"), "tensor")))
    program = compiled(told).lower(memory, x, table).compile()
    found, gradients = program(memory, x, table)
    assert_alike(found, want[0], 1e-5)
    assert_alike(gradients, want[1], 1e-5)
    assert gradients[2].sharding.is_equivalent_to(table.sharding, 2)

    text = program.as_text()
    assert text is not None
    gathered = [
        tuple(map(int, dims.split(",")))
        for dims in re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text)
    ]
    assert gathered  # slots and weights, over tensor
    for shape in gathered:
        assert shape[-1] < 64 and math.prod(shape) < BIG.num_slots, shape
    whole = f"f32[2,{B // 2 * (T // 2)},64]"  # a device's half-scores of its one head
    assert (whole in text) == (not chunked)
