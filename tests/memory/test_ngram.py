"""NGramMemory against its equations, token by token in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import call, compiled
from flax import nnx
from ngram_oracle import addresses, ngram

from memtrain.config import Experiment
from memtrain.data.tokenizer import load_tokenizer
from memtrain.decode.artifact import Artifact
from memtrain.decode.export import export_model
from memtrain.description import BuildContext, Dtypes
from memtrain.errors import BadInput
from memtrain.layers import Block, ModelConfig
from memtrain.layers import NGramMemory as InRecipes
from memtrain.memory import Context, NGramMemory, NGramMemoryConfig, spec_bytes
from memtrain.model.ablation import memory_names, resolve_without
from memtrain.model.flops import forward_flops
from memtrain.model.language_model import LanguageModel
from memtrain.model.parameters import Skeleton
from memtrain.plan.layout import Lookup, lookups
from memtrain.schema import from_dict, to_dict


DIM, T = 6, 16
CONFIG = NGramMemoryConfig(num_slots=20, orders=(2, 3), num_heads=2, head_dim=4, conv=3)
DOCUMENTS = np.array([[-1, -1] + [0] * 3 + [1] + [2] * 8 + [-1] * 2, [0] * T])
VALID = DOCUMENTS >= 0


def build(config: NGramMemoryConfig = CONFIG, dim: int = DIM) -> NGramMemory:
    """Taps drawn: they begin as zero."""
    memory = config.build(BuildContext(dim=dim, dtypes=Dtypes()), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(5)
    memory.conv.taps.set_value(jnp.asarray(rng.normal(size=(config.conv, dim)), jnp.float32))
    for norm in (memory.query_norm, memory.key_norm, memory.conv_norm):
        norm.scale.set_value(jnp.asarray(1 + 0.2 * rng.normal(size=dim), jnp.float32))
    return memory


def parameters(memory: NGramMemory) -> dict[str, np.ndarray]:
    found = {n: getattr(memory, n).weight[...] for n in ("key", "value")}
    found |= {n: getattr(memory, n).scale[...] for n in ("query_norm", "key_norm", "conv_norm")}
    found["taps"] = memory.conv.taps[...]
    return {name: np.asarray(leaf, np.float64) for name, leaf in found.items()}


def draw(config: NGramMemoryConfig = CONFIG) -> tuple[np.ndarray, np.ndarray, Context]:
    """x, the table, and a context of two rows: documents with padding on both sides, a full one."""
    rng = np.random.default_rng(0)
    (spec,) = config.tables().values()
    x = rng.normal(size=(2, T, DIM)).astype(np.float32)
    table = rng.normal(size=(spec.num_slots, spec.value_dim)).astype(np.float32)
    begun = [
        np.maximum.accumulate(np.where(np.diff(d, prepend=-2), np.arange(T), 0)) for d in DOCUMENTS
    ]
    ctx = Context(
        positions=jnp.asarray(np.arange(T) - np.stack(begun), jnp.int32),
        starts=jnp.asarray(VALID & (np.diff(DOCUMENTS, axis=1, prepend=-1) > 0)),
        valid=jnp.asarray(VALID),
        token_ids=jnp.asarray(rng.integers(0, 97, (2, T)), jnp.int32),
        tables={config.table: jnp.asarray(table)},
        want_reads=True,
    )
    return x, table, ctx


def oracle_rows(config: NGramMemoryConfig, ids: np.ndarray) -> np.ndarray:
    return np.stack(
        [
            addresses(
                ids[r].tolist(),
                DOCUMENTS[r].tolist(),
                orders=config.orders,
                heads=config.num_heads,
                slots=config.num_slots,
                seed=config.seed,
            )
            for r in range(2)
        ]
    )


def oracle(config, x, rows, p, table) -> np.ndarray:
    more = {"dilation": max(config.orders), "signed_root": config.signed_root}
    x, table = x.astype(np.float64), table.astype(np.float64)
    return np.stack([ngram(x[r], rows[r], DOCUMENTS[r], p, table, **more) for r in range(2)])


COMPRESSED = dataclasses.replace(
    CONFIG,
    orders=(4, 1),
    num_heads=1,
    conv=2,
    signed_root=False,
    compression=tuple((7 * i) % 40 for i in range(97)),
    seed=9,
)


@pytest.mark.parametrize("config", [CONFIG, COMPRESSED], ids=["plain", "compressed"])
def test_whole_and_in_pieces_equal_the_equations(config):
    memory = build(config)
    x, table, ctx = draw(config)
    ids = np.asarray(ctx.token_ids)
    hashed = ids if config.compression is None else np.array(config.compression)[ids]
    rows = oracle_rows(config, hashed)
    want = oracle(config, x, rows, parameters(memory), table)
    y, none, aux = call(memory, jnp.asarray(x), None, ctx)
    assert none is None
    np.testing.assert_array_equal(aux.reads["slots"], rows)
    np.testing.assert_allclose(np.asarray(y)[VALID], want[VALID], atol=2e-5)

    state, at = compiled(lambda m: m.init_state(2, T))(memory), 0
    for n in (1, 3, 8, 1, 3):
        y, state, aux = call(memory, jnp.asarray(x[:, at : at + n]), state, ctx.window(at, at + n))
        part = VALID[:, at : at + n]
        np.testing.assert_array_equal(aux.reads["slots"], rows[:, at : at + n])
        got, wanted = np.asarray(y)[part], want[:, at : at + n][part]
        np.testing.assert_allclose(got, wanted, atol=2e-5, err_msg=f"token {at}")
        at += n
    tail = max(config.orders) - 1
    np.testing.assert_array_equal(state["ids"][0], hashed[0, 14 - tail : 14])


def test_a_layer_of_one_channel_by_hand():
    """dim 1: norms leave signs, so the gate is sigmoid(1) or sigmoid(-1). Pairs, taps 2 apart."""
    config = NGramMemoryConfig(num_slots=5, orders=(2,), num_heads=1, head_dim=1, conv=2)
    memory = config.build(BuildContext(dim=1), rngs=nnx.Rngs(0))
    memory.key.weight.set_value(jnp.ones((1, 1)))
    memory.value.weight.set_value(jnp.full((1, 1), 0.5))
    memory.conv.taps.set_value(jnp.asarray([[0.5], [-1.0]]))
    table = jnp.full((1024, 1), 2.0)
    ids = jnp.asarray([[3, 1, 4, 1]])
    ctx = Context.of_documents(1, 4, token_ids=ids, tables={"ngram": table})
    y, _, _ = call(memory, jnp.asarray([[[1.0], [1.0], [-1.0], [1.0]]]), None, ctx)
    # u = 0.5 * 2 * alpha, alpha = 0.731059 or 0.268941; silu(0.5) = 0.311230 before tap 2 begins,
    # silu(0.5 - 1) = -0.188770 after.
    want = [0.731059 + 0.311230, 0.731059 + 0.311230, 0.268941 - 0.188770, 0.731059 - 0.188770]
    np.testing.assert_allclose(y[0, :, 0], want, atol=1e-5)


def test_it_begins_as_a_gated_lookup():
    """Zero taps: nothing but alpha v is added, whatever came before."""
    memory = CONFIG.build(BuildContext(dim=DIM), rngs=nnx.Rngs(0))
    x, table, ctx = draw()
    y, _, _ = call(memory, jnp.asarray(x), None, ctx)
    p = parameters(memory)
    assert not p["taps"].any()
    rows = oracle_rows(CONFIG, np.asarray(ctx.token_ids))
    want = oracle(CONFIG, x, rows, {**p, "taps": np.zeros((1, DIM))}, table)
    np.testing.assert_allclose(np.asarray(y)[VALID], want[VALID], atol=2e-5)


def test_gradients_equal_finite_differences_of_the_equations():
    memory = build()
    x, table, ctx = draw()
    rng = np.random.default_rng(1)
    w = np.where(VALID[..., None], rng.normal(size=x.shape), 0)

    def loss(memory, x, table):
        there = dataclasses.replace(ctx, tables={"ngram": table})
        return jnp.sum(memory(x, None, there)[0] * w)

    by_memory, by_x, by_table = compiled(jax.grad(loss, argnums=(0, 1, 2)))(
        memory, jnp.asarray(x), jnp.asarray(table)
    )
    rows = oracle_rows(CONFIG, np.asarray(ctx.token_ids))
    found = parameters(by_memory) | {"x": by_x, "table": by_table}
    exact = parameters(memory) | {"x": x.astype(np.float64), "table": table.astype(np.float64)}

    def exact_loss(name: str, delta: np.ndarray) -> float:
        p = exact | {name: exact[name] + delta}
        return float(np.sum(oracle(CONFIG, p.pop("x"), rows, p, p.pop("table")) * w))

    for name, g in found.items():
        g = np.asarray(g, np.float64)
        assert np.abs(g).max() > 1e-3, name
        direction = rng.normal(size=g.shape)
        slope = (exact_loss(name, 1e-6 * direction) - exact_loss(name, -1e-6 * direction)) / 2e-6
        assert np.vdot(g, direction) == pytest.approx(slope, rel=1e-3, abs=1e-3), name
    touched = np.flatnonzero(np.abs(np.asarray(by_table)).max(axis=1))
    assert touched.tolist() == np.unique(rows[VALID]).tolist()


def test_rows_and_taps_give_the_gradient_of_the_table():
    """As an optimizer of rows puts it together: where each row was read, times the tap's."""
    memory = build()
    x, table, ctx = draw()

    def loss(taps, table):
        there = dataclasses.replace(ctx, tables={"ngram": table}, taps=taps)
        y, _, aux = memory(jnp.asarray(x), None, there)
        return jnp.sum(jnp.sin(y) * VALID[..., None]), aux.table_reads

    taps = {"ngram": jnp.zeros((2, T * 4, 4))}
    gradient = compiled(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (by_tap, none), reads = gradient(taps, jnp.asarray(table))
    assert not np.asarray(none).any()
    (_, dense), _ = gradient(None, jnp.asarray(table))
    slots, weights = (np.asarray(a)[..., 0] for a in (reads["ngram"].slots, reads["ngram"].weights))
    put_together = np.zeros(table.shape)
    read = slots >= 0
    assert read.sum() == 4 * VALID.sum()
    np.add.at(put_together, slots[read], (weights[..., None] * by_tap["ngram"])[read])
    np.testing.assert_allclose(put_together, dense, atol=1e-5)


def test_ids_of_earlier_documents_are_not_felt():
    memory = build()
    x, _, ctx = draw()
    ids = np.asarray(ctx.token_ids).copy()
    ids[0, :6] = 90 - ids[0, :6]  # padding, and the documents before the last
    other = dataclasses.replace(ctx, token_ids=jnp.asarray(ids))
    empty = compiled(lambda m: m.init_state(2, T))(memory)
    y, state, _ = call(memory, jnp.asarray(x), empty, ctx)
    z, moved, _ = call(memory, jnp.asarray(x), empty, other)
    assert np.any(np.asarray(y)[0, 2:6] != np.asarray(z)[0, 2:6])
    np.testing.assert_array_equal(np.asarray(y)[0, 6:14], np.asarray(z)[0, 6:14])
    jax.tree.map(np.testing.assert_array_equal, memory.live_state(state), memory.live_state(moved))


def test_the_state_has_one_size():
    memory = build()
    assert spec_bytes(memory.state_spec(2, 10)) == spec_bytes(memory.state_spec(2, 10**6))
    # Two ids; two taps before the current one, 3 apart: 6 inputs and their documents; a counter.
    assert spec_bytes(memory.state_spec(2, 10)) == 2 * (2 * 4 + 6 * DIM * 4 + 6 * 4 + 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"orders": (2, 2)}, r"orders=\(2, 2\): give different numbers of 1 or more"),
        ({"orders": (1,)}, "one of 2 or more"),
        ({"orders": ()}, "one of 2 or more"),
        ({"num_slots": 0}, "num_slots=0: it takes 1 or more"),
        ({"num_slots": 2**27, "num_heads": 8}, "16 such parts are more rows .*; 134083510 fit"),
        ({"vocab_size": 4, "compression": (0, 0)}, "vocab_size=4: compression has 2 ids"),
        ({"compression": (0, -1)}, "give an id of 0 or more"),
    ],
)
def test_impossible_descriptions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NGramMemoryConfig(**options)


def test_the_largest_table_that_is_said_to_fit_does():
    spec = NGramMemoryConfig(num_slots=134083510, num_heads=8).tables()["ngram"]
    assert 0.998 * 2**31 < spec.num_slots < 2**31


def test_a_vocabulary_beyond_the_hash_is_refused():
    config = NGramMemoryConfig(num_slots=20, vocab_size=256)
    config.check_vocab(256)
    with pytest.raises(ValueError, match=r"vocab_size = 256: .* 0 to 256; give 257"):
        config.check_vocab(257)
    with pytest.raises(ValueError, match="compression: number of ids = 2"):
        NGramMemoryConfig(num_slots=20, compression=(0, 0)).check_vocab(3)
    NGramMemoryConfig(num_slots=20).check_vocab(2**31)


def test_what_a_call_lacks_is_named():
    memory, (x, _, ctx) = build(dataclasses.replace(CONFIG, vocab_size=50)), draw()
    with pytest.raises(ValueError, match=r"ctx.token_ids is None"):
        memory(jnp.asarray(x), None, dataclasses.replace(ctx, token_ids=None))
    with pytest.raises(KeyError, match="no table 'ngram'"):
        memory(jnp.asarray(x), None, dataclasses.replace(ctx, tables={}))
    ids = np.full((2, T), 50)
    host = dataclasses.replace(ctx, token_ids=ids, valid=VALID)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"token id 50: .* 0 to 49"):
        memory(jnp.asarray(x), None, host)


CUTS = ("one_shot", "chunked", "token_by_token")
SMALL = InRecipes(num_slots=40, num_heads=2, head_dim=8, vocab_size=256)
MODEL = ModelConfig(dim=16, pattern=(Block(mixer=SMALL), Block(ffn=SMALL)))


def test_in_a_model_it_has_a_name_a_table_and_flops():
    assert from_dict(ModelConfig, to_dict(MODEL)) == MODEL
    assert memory_names(MODEL) == {"ngram": [(0, "mixer"), (1, "ffn")]}
    assert resolve_without(MODEL, ["ngram"]) == ((0, "mixer"), (1, "ffn"))
    skeleton = Skeleton.of(MODEL, 256)
    assert skeleton.tables == {"tables.ngram"}  # one, that both layers read
    assert skeleton.shapes["tables.ngram"].shape == (1024, 8)
    assert lookups(MODEL) == [Lookup("ngram", rows=4, value_dim=8, answers=4)] * 2
    found = forward_flops(skeleton.merge(skeleton.shapes), 10)
    # Each of two layers: rows of 4 x 8 into keys and values, four taps; then the rows times their
    # scale, a score and a gated value.
    head, layer = 16 * 256, 2 * (4 * 8) * 16 + 4 * 16
    assert found.matmul == 2 * (head + 2 * layer)
    assert found.memory == 2 * (2 * (4 * 8) + 4 * 16)


def test_exported_it_decodes_as_it_was_trained(tmp_path):
    """Chunked, token by token, two documents in a row: export refuses what differs."""
    model = jax.jit(lambda: LanguageModel(MODEL, vocab_size=256, rngs=nnx.Rngs(0)))()
    rng = np.random.default_rng(3)
    for block in model.blocks:
        for place in block.places().values():
            taps = place.layer.conv.taps
            taps.set_value(jnp.asarray(rng.normal(size=taps.shape), jnp.float32))
    out = tmp_path / "model.mtx"
    about = {"run": "t", "step": 1}
    experiment = Experiment(name="ngram", model=MODEL)
    result = export_model(model, experiment, load_tokenizer("bytes"), out, about, programs=False)
    checked = result["checked"]["float32"]
    assert max(checked[cut]["max_difference"] for cut in CUTS) <= 1e-4
    (first, second) = Artifact.load(out).cache_spec()["places"]
    assert first["memory"] == second["memory"] == "ngram"
    assert first["leaves"]["ids"]["shape"] == ["batch", 2]
    assert first["bytes_per_token"] == 0
