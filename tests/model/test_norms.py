"""What a model says of its norms and of its embedding reaches all of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memtrain.errors import BadInput
from memtrain.layers import Attention, Block, GatedDelta, Mamba1, Mamba2, ModelConfig
from memtrain.memory import Context
from memtrain.memory.primitives import RMSNorm
from memtrain.model.language_model import LanguageModel
from memtrain.model.parameters import Skeleton


CONFIG = ModelConfig(
    dim=8,
    pattern=(
        Attention(num_heads=2),
        GatedDelta(num_heads=2, head_dim=4),
        Block(mixer=Mamba1(state_dim=2, inner_norm=True)),
        Block(mixer=Mamba2(head_dim=4, state_dim=2)),
    ),
    norm_epsilon=0.125,
)


def test_every_norm_has_the_epsilon_of_the_model():
    model = nnx.eval_shape(lambda: LanguageModel(CONFIG, vocab_size=5, rngs=nnx.Rngs(0)))
    norms = [module for _, module in nnx.iter_modules(model) if isinstance(module, RMSNorm)]
    assert len(norms) == 1 + 6 + 2 + 1 + 3 + 1
    assert {norm.epsilon for norm in norms} == {0.125}


def test_a_norm_adds_epsilon_to_the_mean_square():
    norm = RMSNorm(4, dtypes=CONFIG.dtypes, epsilon=0.25, groups=2)
    x = jnp.array([3.0, 4.0, 0.0, 1.0])
    want = [3 / 12.75**0.5, 4 / 12.75**0.5, 0, 1 / 0.75**0.5]
    np.testing.assert_allclose(norm(x), want, rtol=1e-6)


def test_the_scale_of_embeddings():
    """An empty block and a large epsilon: what comes out is the embeddings as they are read."""
    config = ModelConfig(dim=4, pattern=(Block(),), norm_epsilon=1e12)
    tokens, ctx = np.array([[0, 1]]), Context.of_documents(1, 2)
    parameters = Skeleton.of(config, 2).init(jax.random.key(0))
    for scale, want in ((None, 2.0), (1.0, 1.0), (3.0, 3.0)):
        scaled = dataclasses.replace(config, embedding_scale=scale)
        hidden, _, _ = Skeleton.of(scaled, 2).merge(parameters)(tokens, None, ctx)
        np.testing.assert_allclose(
            hidden[0] * 1e6, want * np.asarray(parameters["embedding"]), rtol=1e-5
        )


@pytest.mark.parametrize(
    "layer, said",
    [
        ({"rotary_dim": 3}, "rotary_dim=3: it takes an even number"),
        ({"rotary_dim": 6}, "rotary_dim=6: a head has 4 channels"),
    ],
)
def test_channels_that_cannot_be_rotated(layer, said):
    with pytest.raises((ValueError, BadInput), match=said):
        Skeleton.of(ModelConfig(dim=8, pattern=(Attention(num_heads=2, **layer),)), 5)
