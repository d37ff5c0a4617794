"""The example of docs/write-a-memory.md: short, right, lawful, and at home in a model."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memtrain.description import BuildContext, Dtypes
from memtrain.layers import Block, ModelConfig, Window
from memtrain.memory import Context
from memtrain.model.language_model import LanguageModel
from memtrain.testing import check_laws


EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "decayed_average.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("decayed_average", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["decayed_average"] = module
    spec.loader.exec_module(module)
    return module


def test_is_at_most_sixty_lines():
    assert len(EXAMPLE.read_text().splitlines()) <= 60


def test_is_the_file_that_the_page_shows():
    page = (EXAMPLE.parents[1] / "write-a-memory.md").read_text()
    assert EXAMPLE.read_text().strip() in page


def test_equals_its_recurrence(example):
    memory = example.DecayedAverageConfig(state_dim=5).build(
        BuildContext(dim=4, dtypes=Dtypes()), rngs=nnx.Rngs(0)
    )
    x = np.random.default_rng(0).normal(size=(1, 9, 4))
    ctx = Context.of_documents(1, 9)
    with jax.default_matmul_precision("highest"):
        y, _, _ = jax.jit(lambda m, x: m(x, None, ctx))(memory, jnp.asarray(x, jnp.float32))
    weights = {
        name: np.asarray(getattr(memory, name).weight[...], np.float64)
        for name in ("decay", "value", "gate", "output")
    }
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    h = np.zeros(5)
    for t in range(9):
        a, gate = sigmoid(x[0, t] @ weights["decay"]), x[0, t] @ weights["gate"]
        h = (
            a * h + (1 - a) * (x[0, t] @ weights["value"])
            if t
            else (x[0, t] @ weights["value"]) * (1 - a)
        )
        want = (h * gate * sigmoid(gate)) @ weights["output"]
        np.testing.assert_allclose(y[0, t], want, atol=1e-5)


@pytest.mark.full
def test_keeps_all_laws(example):
    report = check_laws(_make(example))
    assert [o.law for o in report.outcomes if o.status != "holds"] == ["context_parallel"]


@pytest.mark.full
def test_trains_in_a_model_beside_attention(example):
    blocks = Block(mixer=Window(4, num_heads=2)), Block(mixer=example.DecayedAverageConfig())
    config = ModelConfig(dim=16, pattern=blocks)
    model = jax.jit(lambda: LanguageModel(config, vocab_size=11, rngs=nnx.Rngs(0)))()
    tokens = jnp.arange(14).reshape(2, 7) % 11

    def loss(model):
        hidden, _, _ = model(tokens, None, Context.of_documents(2, 7))
        return -jax.nn.log_softmax(model.logits(hidden))[..., 3].mean()

    # Unoptimised machine code, which is ready sooner.
    options = {"xla_backend_optimization_level": 0}
    gradient = jax.jit(jax.grad(loss), compiler_options=options)(model)
    for leaf in jax.tree.leaves(gradient.blocks[1].mixer):
        assert np.abs(leaf).max() > 0


def _make(example):
    def make(dtypes, rngs):
        context = BuildContext(dim=16, dtypes=dtypes)
        memory = example.DecayedAverageConfig(state_dim=12).build(context, rngs=rngs)
        # Large enough for what it carries to be felt: the laws ask for that first.
        memory.value.weight.set_value(3 * memory.value.weight[...])
        return memory

    return make
