"""The engine against the training path, which keeps no state."""

import dataclasses
import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from xla_flags import with_devices

from memtrain.decode.engine import Engine
from memtrain.decode.golden import training_logits
from memtrain.errors import BadInput
from memtrain.layers import Attention, Block, ModelConfig
from memtrain.memory.protocol import Context, spec_bytes

from .conftest import CONFIG, VOCAB, random_model


def close(found, expected):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=1e-5)


def test_prefill_and_steps_give_the_training_logits(engine, tokens, expected):
    close(engine.prefill(tokens[:, :37]), expected[:, 36])
    for i in range(37, 96):
        close(engine.step(tokens[:, i]), expected[:, i])


def test_ragged_prompts(engine, tokens, expected):
    logits = engine.prefill([tokens[0, :50], tokens[1, :3]])
    close(logits, [expected[0, 49], expected[1, 2]])
    close(engine.step([tokens[0, 50], tokens[1, 3]]), [expected[0, 50], expected[1, 3]])


def test_an_empty_prompt_in_a_row_keeps_its_logits(engine, tokens, expected):
    engine.prefill(tokens[:, :5])
    close(engine.prefill([tokens[0, 5:9], []]), [expected[0, 8], expected[1, 4]])


def test_a_document_begins_where_starts_says(engine, tokens, expected):
    starts = np.zeros((2, 60), bool)
    starts[0, 20] = True
    mixed = np.concatenate([tokens[:, 60:80], tokens[:, :40]], axis=1)
    logits = engine.prefill(mixed, starts=starts)
    close(logits[0], expected[0, 39])
    assert np.abs(np.asarray(logits[1]) - expected[1, 39]).max() > 1e-2


def test_reset_of_one_row(engine, tokens, expected):
    engine.prefill(tokens[:, :30])
    engine.reset([1])
    assert engine.used.tolist() == [30, 0]
    logits = engine.prefill([tokens[0, 30:33], tokens[1, :4]])
    close(logits, [expected[0, 32], expected[1, 3]])


def test_fork_goes_on_twice(engine, tokens, expected):
    engine.prefill([tokens[0, :40], tokens[1, :9]])
    engine.fork([0, 0])
    assert engine.used.tolist() == [40, 40]
    other = (tokens[0, 40] + 1) % VOCAB
    logits = np.asarray(engine.step([tokens[0, 40], other]))
    close(logits[0], expected[0, 40])
    assert np.abs(logits[1] - expected[0, 40]).max() > 1e-2
    with pytest.raises(BadInput, match="fork"):
        engine.fork([0, 2])


def test_score_is_the_cross_entropy_of_the_training_logits(engine, tokens, expected):
    logits = expected.astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    scores = engine.score(tokens)
    assert scores.nll.shape == (2, 95)
    close(scores.nll, nll)
    assert (scores.correct == (expected[:, :-1].argmax(-1) == tokens[:, 1:])).all()
    # In pieces, with explicit targets and an end that is not valid.
    engine.reset()
    first = engine.score(tokens[:, :41], tokens[:, 1:42])
    valid = np.arange(54) < np.array([[54], [20]])
    second = engine.score(tokens[:, 41:95], tokens[:, 42:96], valid=valid)
    close(np.concatenate([first.nll, second.nll], 1)[0], nll[0])
    close(second.nll[1, :20], nll[1, 41:61])
    assert (second.nll[1, 20:] == 0).all() and not second.correct[1, 20:].any()


def test_nothing_compiles_after_warmup(engine):
    rng = np.random.default_rng(2)
    before = engine.compilations
    assert before > 0
    for _ in range(60):
        engine.reset() if rng.random() < 0.5 else engine.reset([0, 1])
        lengths = rng.integers(1, 40, 2)
        engine.prefill([rng.integers(0, VOCAB, n) for n in lengths])
        for _ in range(rng.integers(4)):
            engine.step(rng.integers(0, VOCAB, 2))
        engine.fork([1, 0])
        engine.score(rng.integers(0, VOCAB, (2, rng.integers(2, 40))))
    assert engine.compilations == before


def test_the_guard_sees_a_compilation(engine):
    """A count that cannot rise proves nothing."""
    before = engine.compilations
    with engine._counted():
        jax.jit(lambda x: x * 3 + 1)(np.zeros(7))
    assert engine.compilations == before + 1


def test_a_prompt_longer_than_the_capacity_is_refused(engine, tokens, expected):
    with pytest.raises(BadInput, match=r"^97 tokens .* capacity of 96: .* at least 97$"):
        engine.prefill([np.zeros(97, int), [1]])
    engine.prefill(tokens[:, :95])
    close(engine.step(tokens[:, 95]), expected[:, 95])
    with pytest.raises(BadInput, match="1 tokens after 96 in the cache"):
        engine.step([0, 0])
    with pytest.raises(BadInput, match="after 96"):
        engine.score(tokens[:, :2])


@pytest.mark.parametrize("call", ["prefill", "score", "step"])
def test_bad_tokens_are_refused(engine, call):
    bad = [VOCAB, 0] if call == "step" else [[1, VOCAB], [0, 0]]
    with pytest.raises(BadInput, match="token 257 is not in the vocabulary of 257"):
        getattr(engine, call)(bad)
    assert engine.used.tolist() == [0, 0]


def test_without_leaves_memories_out_of_decoding(tokens):
    model = random_model(dataclasses.replace(CONFIG, pattern=CONFIG.pattern[::-1], repeats=1))
    engine = Engine(model, batch=2, capacity=96, chunk=24, without=("product_key", "1.mixer"))
    out = ((0, "ffn"), (1, "mixer"))

    @jax.jit
    def train(model, tokens):
        ctx = Context.of_documents(2, tokens.shape[1])
        return model.logits(model(tokens, None, ctx, without=out)[0])

    close(engine.prefill(tokens[:, :48]), np.asarray(train(model, tokens[:, :48]))[:, -1])


def test_rings_take_a_stream_without_end():
    """Windows alone: more tokens than the capacity, at a footprint that does not grow."""
    config = dataclasses.replace(CONFIG, pattern=CONFIG.pattern[:1], repeats=1)
    model = random_model(config)
    engine = Engine(model, capacity=16, chunk=16)
    assert not engine.bounded
    footprint = engine.state_bytes
    tokens = np.random.default_rng(3).integers(0, VOCAB, (1, 100))
    starts = np.arange(100)[None] == 0
    expected, _ = training_logits(model, tokens.astype(np.int32), starts)
    close(engine.prefill(tokens), expected[:, -1])
    assert engine.state_bytes == footprint
    assert Engine(model, capacity=4).bounded  # a ring shorter than the window may not wrap


def test_a_step_copies_neither_cache_nor_parameters(capsys):
    """The issue's number: a 32 MiB cache, of which a step may not hold half a second time."""
    config = ModelConfig(
        dim=128,
        pattern=(Block(mixer=Attention(num_heads=4)), Block(mixer=Attention(num_heads=4))),
        repeats=2,
    )
    model = random_model(config, 256)
    capacity = (32 << 20) // (config.repeats * 2 * 2 * 128 * 4)
    engine = Engine(model, capacity=capacity)
    assert engine.state_bytes >= 32 << 20
    assert engine.state_bytes == spec_bytes(model.state_spec(1, capacity))
    memory = engine.step_memory()
    assert memory["in_place"] >= engine.state_bytes
    assert memory["temporaries"] < engine.state_bytes / 2
    engine.step([0])
    times = []
    for i in range(20):
        begun = time.perf_counter()
        jax.block_until_ready(engine.step([i]))
        times.append(time.perf_counter() - begun)
    with capsys.disabled():
        print(f" [step with a 32 MiB cache: {1e3 * min(times):.1f} ms]", end="")
    assert min(times) < 1


ONE_DEVICE = """
from flax import nnx
from memtrain.decode.engine import Engine
from memtrain.layers import Attention, Block, ModelConfig
from memtrain.model.language_model import LanguageModel

for kv_heads in (2, 4):
    mixer = Attention(num_heads=4, num_kv_heads=kv_heads, key_conv=2)
    config = ModelConfig(dim=64, pattern=(Block(mixer=mixer),))
    model = LanguageModel(config, vocab_size=32, rngs=nnx.Rngs(0))
    for batch in (1, 3):
        memory = Engine(model, batch=batch, capacity=16384).step_memory()
        print(kv_heads, batch, memory["temporaries"] / memory["in_place"])
"""


@pytest.mark.full
def test_a_step_of_one_layer_on_one_device_copies_no_cache():
    """The form of attention that one device takes, at the batch sizes that XLA treats apart."""
    ended = subprocess.run(
        [sys.executable, "-c", ONE_DEVICE],
        env=os.environ | {"XLA_FLAGS": with_devices(1)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    rows = [line.split() for line in ended.stdout.splitlines()]
    assert len(rows) == 4
    for kv_heads, batch, share in rows:
        assert float(share) < 0.25, f"{kv_heads} kv heads, {batch} rows: {share} of the state"


def test_arguments_that_make_no_engine(model):
    for capacity, batch, chunk in ((0, 1, 1), (8, 0, 1), (8, 1, 0)):
        with pytest.raises(BadInput, match="must be at least 1"):
            Engine(model, capacity=capacity, batch=batch, chunk=chunk)
    with pytest.raises(BadInput, match="no such memory; it has window, attention, product_key"):
        Engine(model, capacity=8, without=("bank",))
