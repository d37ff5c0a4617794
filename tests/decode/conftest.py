"""One small model with every memory, random weights drawn by NumPy, and one artifact of it."""

from pathlib import Path

import jax
import numpy as np
import pytest

from memtrain.config import Experiment
from memtrain.data.tokenizer import load_tokenizer
from memtrain.decode.engine import Engine
from memtrain.decode.export import export_model
from memtrain.decode.golden import training_logits
from memtrain.layers import Attention, Block, ModelConfig, ProductKeyMemory, Window
from memtrain.model.language_model import LanguageModel
from memtrain.model.unstacked import abstract_model, from_tensors, stack_model, tensor_names


VOCAB = 257
CONFIG = ModelConfig(
    dim=32,
    pattern=(
        Block(mixer=Window(8, num_heads=2, num_kv_heads=1, sink_tokens=2)),
        Block(
            mixer=Attention(num_heads=2, key_conv=2),
            ffn=ProductKeyMemory(num_slots=64, num_heads=2, top_k=3, key_dim=8, value_dim=12),
        ),
    ),
    repeats=2,
    tied_embeddings=False,
)


def random_model(config: ModelConfig, vocab_size: int = VOCAB, seed: int = 0) -> LanguageModel:
    """Weights of standard deviation fan_in ** -0.5, so that every layer moves its output."""

    rng = np.random.default_rng(seed)
    abstract = abstract_model(config, vocab_size)
    tensors = {}
    for name, leaf in zip(tensor_names(abstract), jax.tree.leaves(abstract), strict=True):
        draw = rng.standard_normal(leaf.shape)
        if name.endswith(".scale"):
            value = 1 + 0.1 * draw
        elif name.endswith(("mixer_gate", "ffn_gate")):
            value = 0.8 + 0.1 * draw
        elif name.endswith("log_temperature"):
            value = 0.7 + 0.1 * draw
        elif name == "embedding" or name.startswith("tables."):
            value = draw * leaf.shape[-1] ** -0.5
        else:
            value = draw * leaf.shape[-2] ** -0.5
        tensors[name] = value.astype(leaf.dtype)
    return stack_model(from_tensors(config, vocab_size, tensors))


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    return random_model(CONFIG)


@pytest.fixture(scope="session")
def artifact_path(model, tmp_path_factory) -> Path:
    """A finished export. Tests that change a file copy it first."""
    out = tmp_path_factory.mktemp("artifact") / "model.mtx"
    export_model(
        model,
        Experiment(name="random", model=CONFIG),
        load_tokenizer("bytes"),
        out,
        {"run": "random", "step": 7},
    )
    return out


@pytest.fixture(scope="session")
def shared_engine(model) -> Engine:
    """Two rows of 96 tokens, warm. Compiling it takes longer than all tests that use it."""
    engine = Engine(model, batch=2, capacity=96, chunk=24)
    engine.warmup()
    return engine


@pytest.fixture
def engine(shared_engine) -> Engine:
    shared_engine.reset()
    return shared_engine


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCAB, (2, 96)).astype(np.int32)


@pytest.fixture(scope="session")
def expected(model, tokens) -> np.ndarray:
    """Logits of the training path for `tokens`, one document a row."""
    starts = np.zeros(tokens.shape, bool)
    starts[:, 0] = True
    return training_logits(model, tokens, starts)[0]
