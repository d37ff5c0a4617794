"""GatedDelta, Mamba2 and Mamba1: whole, in pieces and token by token, against float64 oracles."""

import math
from typing import Any

import jax
import numpy as np
import pytest
from compiled import call
from flax import nnx
from matrix_oracle import gated_delta, mamba1, mamba2

from memtrain.description import BuildContext, Dtypes, LayerDescription
from memtrain.layers import (
    Block,
    DeltaNet,
    GatedDelta,
    GatedDeltaNet,
    GatedDeltaNet2,
    GatedLinearAttention,
    KimiDelta,
    Mamba1,
    Mamba2,
    ModelConfig,
)
from memtrain.memory import Context, Memory, spec_bytes
from memtrain.model.parameters import Skeleton
from memtrain.train.optimizer import is_matrix


DIM, T = 12, 24
SMALL: dict[str, Any] = {"num_heads": 2, "head_dim": 4, "value_dim": 6}


def oracle_of(layer: LayerDescription) -> Any:
    if isinstance(layer, GatedDelta):
        return lambda x, w: gated_delta(
            x,
            w,
            heads=layer.num_heads,
            key_heads=layer.num_key_heads or layer.num_heads,
            decay=layer.decay,
            erase=layer.erase,
            write=layer.write,
            negative=layer.negative,
            conv=layer.conv,
            gate=layer.gate,
        )
    if isinstance(layer, Mamba2):
        shape = layer.shape(DIM)
        groups = {"groups": layer.num_groups, "norm_groups": layer.norm_groups}
        return lambda x, w: mamba2(x, w, heads=shape.num_heads, **groups)
    assert isinstance(layer, Mamba1)
    return lambda x, w: mamba1(x, w, inner_norm=layer.inner_norm)


LAYERS = {
    "gated deltanet, shared keys": GatedDeltaNet(num_key_heads=1, **SMALL),
    "kimi": KimiDelta(**SMALL),
    "deltanet": DeltaNet(negative=True, **SMALL),
    "gated deltanet 2": GatedDeltaNet2(**SMALL),
    "gated linear attention": GatedLinearAttention(**SMALL),
    "mamba2": Mamba2(head_dim=6, state_dim=5, num_groups=2),
    "mamba2, normed by group": Mamba2(head_dim=6, state_dim=5, num_groups=2, norm_groups=2),
    "mamba1": Mamba1(state_dim=5, step_rank=3),
    "jamba's mamba1": Mamba1(state_dim=5, step_rank=3, inner_norm=True),
}


def built(layer: LayerDescription) -> Memory:
    """Norms, biases and rates drawn too, so that leaving one out is felt."""
    memory = layer.build(BuildContext(dim=DIM, dtypes=Dtypes()), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape, np.float32), memory)


@pytest.mark.parametrize("name", LAYERS)
def test_against_the_oracle(name):
    layer = LAYERS[name]
    memory = built(layer)
    x = np.random.default_rng(1).standard_normal((1, T, DIM)).astype(np.float32)
    flat = nnx.to_flat_state(nnx.state(memory))
    weights = {".".join(map(str, path)): np.asarray(a[...], np.float64) for path, a in flat}
    want = oracle_of(layer)(x[0].astype(np.float64), weights)
    ctx = Context.of_documents(1, T)
    y, none, _ = call(memory, x, None, ctx)
    assert none is None
    np.testing.assert_allclose(y[0], want, atol=1e-5 * np.abs(want).max())
    state = memory.init_state(1, T)
    assert spec_bytes(memory.state_spec(1, T)) == sum(a.nbytes for a in jax.tree.leaves(state))
    begin, pieces = 0, []
    for n in (13, 1, 1, 1, 8):
        cut = ctx.window(begin, begin + n)
        y, state, _ = call(memory, x[:, begin : begin + n], state, cut)
        pieces.append(y[0])
        begin += n
    np.testing.assert_allclose(np.concatenate(pieces), want, atol=1e-5 * np.abs(want).max())
    # The oracle knows every parameter: without any one of them it says something else.
    for parameter in weights:
        other = weights | {parameter: weights[parameter] * 1.5 + 0.2}
        moved = oracle_of(layer)(x[0].astype(np.float64), other)
        assert np.abs(moved - want).max() > 1e-3 * np.abs(want).max(), parameter


def test_steps_and_rates_begin_where_the_papers_have_them():
    memory = Mamba2(head_dim=1, state_dim=2).build(BuildContext(dim=512), rngs=nnx.Rngs(0))
    step = np.logaddexp(0, np.asarray(memory.step_bias[...], np.float64))
    assert 1e-3 * 0.999 < step.min() < 1.2e-3 and 0.08 < step.max() < 0.1001
    assert abs(np.median(np.log(step)) - math.log(1e-2)) < 0.3
    rate = np.exp(np.asarray(memory.log_rate[...]))
    assert 1 <= rate.min() < 1.2 and 15.8 < rate.max() <= 16
    first = Mamba1(state_dim=3).build(BuildContext(dim=8), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(np.exp(first.log_rate[...]), [[1, 2, 3]] * 16, rtol=1e-6)


def test_rates_and_biases_do_not_decay():
    layers = (Mamba1(state_dim=2), Mamba2(head_dim=4, state_dim=2), GatedDelta(**SMALL))
    blocks = tuple(Block(mixer=layer) for layer in layers)
    skeleton = Skeleton.of(ModelConfig(dim=DIM, pattern=blocks), 7)
    decayed = {n.split(".layer.")[-1] for n, axes in skeleton.axes().items() if is_matrix(n, axes)}
    assert {"step.weight", "conv.taps", "output.weight", "erase_gate.weight"} <= decayed
    assert not {"log_rate", "step_bias", "skip", "conv.bias", "norm.scale"} & decayed


def test_metrics():
    memory = built(GatedDelta(**SMALL))
    x = np.random.default_rng(1).standard_normal((1, T, DIM)).astype(np.float32)
    _, _, aux = call(memory, x, None, Context.of_documents(1, T, want_metrics=True))
    assert sorted(aux.metrics) == ["erased", "kept"]
    assert all(0 < float(value) < 1 for value in aux.metrics.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GatedDelta(num_heads=3, num_key_heads=2), "num_heads=3 is not a multiple of"),
        (lambda: GatedDelta(erase=None), 'write="tied" is to erase="head", and erase=None'),
        (lambda: GatedDelta(erase=None, write=None, negative=True), "negative=True is of what is"),
        (lambda: GatedDelta(unit_keys=False), "unit_keys=False: keys that erase must have unit"),
        (lambda: GatedDelta(conv=1), "conv=1: it takes 2 or more"),
        (lambda: Mamba2(head_dim=7).shape(DIM), r"head_dim=7: expand \* dim = 24 is no multiple"),
        (lambda: Mamba2(head_dim=8, num_groups=2).shape(DIM), "num_groups=2: there are 3 heads"),
        (lambda: Mamba1(state_dim=0), "state_dim=0: it takes 1 or more"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
