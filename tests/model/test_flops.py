"""FLOPs of a token, against sums written out from the architecture by hand."""

import jax
import pytest
from flax import nnx

from memtrain.layers import (
    Attention,
    Block,
    GatedDelta,
    Mamba1,
    Mamba2,
    ModelConfig,
    ProductKeyMemory,
    ShortConv,
    SwiGLU,
    Window,
)
from memtrain.model.flops import Flops, forward_flops
from memtrain.model.language_model import LanguageModel


DIM, VOCAB, SEQ_LEN = 24, 50, 10


def flops_of(*pattern, seq_len: int = SEQ_LEN, vocab: int = VOCAB, **more) -> Flops:
    config = ModelConfig(dim=DIM, pattern=pattern, **more)
    model = nnx.eval_shape(lambda: LanguageModel(config, vocab_size=vocab, rngs=nnx.Rngs(0)))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model))
    return forward_flops(model, seq_len)


def only(mixer, seq_len: int = SEQ_LEN) -> Flops:
    """Of a model with this mixer alone: one repeat, no feed-forward layer, a head of one word."""
    return flops_of(Block(mixer=mixer), seq_len=seq_len, vocab=1)


def test_every_kind_of_layer_by_hand():
    found = flops_of(
        Block(mixer=Window(4, num_heads=3), ffn=SwiGLU(hidden=36)),
        Block(
            mixer=Attention(num_heads=4, num_kv_heads=2, head_dim=10),
            ffn=ProductKeyMemory(num_slots=25, num_heads=3, top_k=2, key_dim=10, value_dim=14),
        ),
        Block(mixer=ShortConv(3)),
        repeats=2,
    )
    window = 24 * 24 + 2 * 24 * 24 + 24 * 24  # query, key and value, output
    swiglu = 3 * 24 * 36  # gate, input, output
    grouped = 24 * 40 + 2 * 24 * 20 + 40 * 24  # 4 heads of 10, and 2 of keys and of values
    product_key = 24 * 30 + 24 * 14 + 14 * 24  # query, gate, output
    convolution = 3 * 24  # a tap and a product for every channel
    head = 24 * 50
    multiply_adds = 2 * (window + swiglu + grouped + product_key + convolution) + head
    assert multiply_adds == 19_680
    assert found.matmul == 2 * multiply_adds

    # A window of 4 in a row of 10 sees 1, 2, 3 and then 4 positions; without one, 1 to 10.
    local = (1 + 2 + 3 + 7 * 4) / 10
    whole = (1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 + 9 + 10) / 10
    # One product for the score and one for the value, for each query head and position seen.
    attention = 2 * (local * (3 * 8 + 3 * 8) + whole * (4 * 10 + 4 * 10))
    assert attention == pytest.approx(1206.4)
    assert found.attention == pytest.approx(2 * attention)

    # Each of 3 heads: two sets of 5 half-keys of width 5, then 2 rows of 14 values.
    memory = 2 * 3 * (2 * 5 * 5 + 2 * 14)
    assert memory == 468
    assert found.memory == 2 * memory

    assert found.total == pytest.approx(39_360 + 2412.8 + 936)
    assert found.training == pytest.approx(3 * 42_708.8)


@pytest.mark.parametrize("seq_len", [1, 2, 7, 8, 9, 64])
@pytest.mark.parametrize("window", [1, 3, 8, None])
def test_attention_counts_the_positions_that_are_seen(window: int | None, seq_len: int):
    seen = [t + 1 if window is None else min(t + 1, window) for t in range(seq_len)]
    expected = 4 * 24 * sum(seen) / seq_len
    assert only(Attention(num_heads=2, window=window), seq_len).attention == pytest.approx(expected)


def test_the_causal_square_is_half_of_the_whole():
    """Of long rows: 4 n^2 d multiply-adds and adds a layer, halved."""
    found = only(Attention(num_heads=2), seq_len=100_000).attention * 100_000
    assert found == pytest.approx(4 * 100_000**2 * 24 / 2, rel=1e-4)


def test_shared_keys_save_projections_but_no_scores():
    own, shared = only(Attention(num_heads=4)), only(Attention(num_heads=4, num_kv_heads=1))
    assert own.attention == shared.attention
    # 3 heads of width 6 fewer, of keys and of values.
    assert own.matmul - shared.matmul == 2 * 2 * 24 * (3 * 6)


def test_convolved_keys_cost_their_taps():
    plain, convolved = only(Attention(num_heads=4)), only(Attention(num_heads=4, key_conv=3))
    assert convolved.matmul - plain.matmul == 2 * 3 * 24
    assert convolved.attention == plain.attention


def test_the_head_counts_once_whether_tied_or_not():
    layer = Block(mixer=ShortConv(2))
    tied, untied = flops_of(layer), flops_of(layer, tied_embeddings=False)
    assert tied == untied
    # The embedding is a lookup: a larger vocabulary costs the head's products only.
    assert flops_of(layer, vocab=51).total - tied.total == 2 * 24


def test_the_value_table_costs_the_rows_that_are_read():
    """16 times the slots: 4 times the half-keys, and nothing for the rows that nobody reads."""
    small, large = (
        flops_of(Block(ffn=ProductKeyMemory(num_slots=n, num_heads=1, top_k=3, key_dim=8)))
        for n in (16, 256)
    )
    assert large.matmul == small.matmul
    assert large.memory - small.memory == 2 * (2 * (16 - 4) * 4)


def test_repeats_multiply_all_but_the_head():
    block = Block(
        mixer=Window(4, num_heads=3), ffn=ProductKeyMemory(num_slots=16, top_k=2, key_dim=8)
    )
    once, thrice = flops_of(block), flops_of(block, repeats=3)
    head = 2 * 24 * 50
    assert thrice.matmul - head == 3 * (once.matmul - head)
    assert thrice.attention == pytest.approx(3 * once.attention)
    assert thrice.memory == 3 * once.memory


def test_sink_tokens_are_seen_too():
    """By brute force over queries and keys of one row."""
    window, sinks, seq_len, dim = 4, 8, 64, 8
    seen = sum(
        t - s < window or s < sinks for t in range(seq_len) for s in range(seq_len) if s <= t
    )
    config = ModelConfig(
        dim=dim, pattern=(Block(mixer=Window(window, num_heads=1, sink_tokens=sinks)),)
    )
    model = nnx.eval_shape(lambda: LanguageModel(config, vocab_size=4, rngs=nnx.Rngs(0)))
    assert forward_flops(model, seq_len).attention == pytest.approx(4 * dim * seen / seq_len)


def test_recurrent_layers_by_hand():
    """As single tokens read and write them: a product is two operations."""
    delta = only(GatedDelta(num_heads=3, num_key_heads=1, head_dim=5, value_dim=7))
    into = 24 * (5 + 5 + 21) + 4 * (5 + 5 + 21)  # query, key, value; four taps of each channel
    rest = 24 * 3 + 24 * 3 + 24 * 21 + 21 * 24  # decay, erase, gate, output
    assert delta.matmul == 2 * (into + rest + 24)
    assert delta.memory == 2 * 3 * (3 * 5 * 7)  # erased, written, read

    mamba2 = only(Mamba2(head_dim=12, state_dim=5))
    into = 24 * (48 + 5 + 5) + 4 * (48 + 5 + 5)
    assert mamba2.matmul == 2 * (into + 24 * 4 + 24 * 48 + 48 * 24 + 24)  # step, gate, output
    assert mamba2.memory == 2 * 2 * (4 * 5 * 12)

    mamba1 = only(Mamba1(state_dim=5, step_rank=3))
    inner = 48 * 3 + 2 * 48 * 5 + 3 * 48 + 4 * 48
    assert mamba1.matmul == 2 * (2 * 24 * 48 + inner + 48 * 24 + 24)
    assert mamba1.memory == 2 * 2 * 48 * 5
