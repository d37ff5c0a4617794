"""Bytes of parameters, optimizer, carry and caches, against sums by hand."""

from functools import partial

import pytest

from memtrain.config import Experiment
from memtrain.data.config import DataConfig
from memtrain.description import Dtypes
from memtrain.layers import Attention, Block, ModelConfig, ProductKeyMemory, SwiGLU, Window
from memtrain.parallel.config import MeshConfig
from memtrain.plan.cache import decode_state, kv_cache_bytes
from memtrain.plan.layers import kinds_of_layers
from memtrain.plan.sizes import state_sizes
from memtrain.train.config import TrainConfig


GiB = 2**30
MIXED = ModelConfig(
    dim=8,
    pattern=(
        Block(mixer=Attention(num_heads=2, num_kv_heads=1, head_dim=4), ffn=SwiGLU(hidden=12)),
        Block(ffn=ProductKeyMemory(num_slots=16, num_heads=2, top_k=2, key_dim=4, value_dim=6)),
    ),
    repeats=3,
)
# query, key and value, output, the norms of queries and keys, the place's own norm
ATTENTION = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 2 * 4 + 8
SWIGLU = 3 * 8 * 12 + 8
# query, two sets of half-keys, a temperature a head, gate, output, norm
PRODUCT_KEY = 8 * 8 + 2 * 2 * 4 * 2 + 2 + 8 * 6 + 6 * 8 + 8
TABLE, EMBEDDING = 16 * 6, 16 * 8 + 8
PARAMETERS = 3 * (ATTENTION + SWIGLU + PRODUCT_KEY) + TABLE + EMBEDDING


def experiment(mesh: MeshConfig | None = None, model: ModelConfig = MIXED, **train) -> Experiment:
    return Experiment(
        name="x",
        model=model,
        mesh=mesh or MeshConfig(),
        data=DataConfig(order="document"),
        train=TrainConfig(**{"batch_size": 8, "seq_len": 32, **train}),
    )


def test_parameters_and_optimizer_by_hand():
    sizes = state_sizes(experiment(), vocab_size=16)
    assert PARAMETERS == 2350
    assert sizes.total().whole == sizes.total().local == 4 * 2350
    # Two moments of each, a count of steps for the moments and the schedule of both groups, and for
    # each row of the table how often and when it was updated.
    assert sizes.optimizer.whole == 2 * 4 * 2350 + 4 * 4 + 2 * 4 * 16
    assert sizes.carry.whole == 0


def test_a_table_in_host_memory_is_counted_there():
    there = state_sizes(experiment(MeshConfig(table_memory="host")), vocab_size=16)
    here = state_sizes(experiment(), vocab_size=16)
    table, moments = 4 * TABLE, 2 * 4 * TABLE + 2 * 4 * 16
    assert there.on_host() == table + moments and here.on_host() == 0
    assert there.parameters_on_device() == here.total().local - table
    assert there.optimizer_on_device() == here.optimizer.local - moments
    # Its gradient is of rows, however many are read; that of a table on the device is whole here.
    assert there.gradients(256).local == 4 * (PARAMETERS - TABLE)
    assert here.gradients(256).local == 4 * PARAMETERS


def test_frozen_parameters_have_no_gradients_and_no_moments():
    sizes = state_sizes(experiment(freeze=("embedding",)), vocab_size=16)
    assert sizes.total(trained_only=True).whole == 4 * (2350 - 16 * 8)
    assert sizes.optimizer.whole == 2 * 4 * (2350 - 16 * 8) + 4 * 4 + 2 * 4 * 16


def test_a_mesh_divides_what_its_axes_divide():
    sizes = state_sizes(experiment(MeshConfig(data=2, fsdp=4, tensor=2)), vocab_size=16)
    leaves = {leaf.name: leaf for leaf in sizes.parameters}
    query = leaves["blocks.0.mixer.layer.query.weight"]
    assert (query.whole, query.local, query.gathered) == (4 * 3 * 64, 4 * 3 * 64 // 8, 4 * 3 * 32)
    assert query.spec == "(-, fsdp, tensor)"
    # One key-value head of 4 numbers is split in two by the tensor axis; the norm is whole.
    assert leaves["blocks.0.mixer.norm.scale"].local == 4 * 3 * 8
    table = leaves["tables.memory"]
    assert (table.whole, table.local, table.is_table) == (4 * 96, 4 * 96 // 8, True)


def test_the_carry_of_windows_by_hand():
    model = ModelConfig(dim=8, pattern=(Window(5, num_heads=2),), repeats=3)
    sizes = state_sizes(
        experiment(MeshConfig(data=4), model, batch_size=8, carry="stop"), vocab_size=16
    )
    # Keys and values of 5 slots; position and document of each; three scalars, one of them a bool.
    row = 5 * 2 * 8 * 4 + 5 * 2 * 4 + 4 + 4 + 1
    assert sizes.carry.whole == 3 * 8 * row
    assert sizes.carry.local == 3 * 2 * row


def test_llama_2_70b_at_128k_takes_40_gib_of_cache():
    """80 layers, 8 key-value heads of 128 (Touvron et al. 2023, table 1 and section 2.2)."""
    cache = partial(kv_cache_bytes, layers=80, kv_heads=8, head_dim=128, tokens=131_072)
    bf16, int8 = cache(), cache(dtype="int8")
    assert bf16.total == 40 * GiB
    assert int8.content == 20 * GiB
    # Four bytes beside every 128: one in 32 of 20 GiB.
    assert int8.scales == 20 * GiB // 32
    assert cache(dtype="int8", tokens_per_scale=64).scales == 20 * GiB // 32 // 64
    assert cache(dtype="int8", tokens_per_scale=None).scales == 2 * 80 * 8 * 4
    assert bf16.scales == 0


def test_a_model_of_llamas_shape_declares_the_same_cache():
    """The formula against the spec that the memory itself declares, and its positions."""
    attention = Attention(num_heads=64, num_kv_heads=8, head_dim=128)
    model = ModelConfig(
        dim=16,
        pattern=(Block(mixer=attention),),
        repeats=80,
        dtypes=Dtypes(state="bfloat16"),
    )
    (row,) = decode_state(model, vocab_size=16)
    indices = 80 * 2 * 4  # a position and a document for each token of each layer
    assert (row["kind"], row["layers"]) == ("attention", 80)
    assert row["bytes_per_token"] * 131_072 == 40 * GiB + indices * 131_072


def test_kinds_of_layers_by_hand():
    kinds = {kind.kind: kind for kind in kinds_of_layers(MIXED, vocab_size=16, seq_len=10)}
    assert kinds["attention"].parameters == 3 * ATTENTION
    assert kinds["swiglu"].parameters == 3 * SWIGLU
    assert kinds["product_key"].parameters == 3 * PRODUCT_KEY
    assert kinds["table"].parameters == TABLE
    assert kinds["embedding and head"].parameters == EMBEDDING
    assert [kinds[k].layers for k in ("attention", "swiglu", "product_key")] == [3, 3, 3]
    assert kinds["swiglu"].flops.total == 2 * 3 * 3 * 8 * 12
    # Of ten tokens, one sees 5.5 on average; a product for the score and one for the value.
    assert kinds["attention"].flops.attention == pytest.approx(3 * 4 * 5.5 * 8)
    assert kinds["product_key"].flops.memory == 3 * (2 * 2 * 4 * 4 + 2 * 2 * 2 * 6)
    # A key and a value of one head of 4, in float32, and two indices.
    assert kinds["attention"].bytes_per_token == 3 * (2 * 4 * 4 + 2 * 4)
    assert kinds["product_key"].bytes_per_token == kinds["table"].bytes_per_token == 0
