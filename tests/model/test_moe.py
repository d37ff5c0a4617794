"""Mixtures of experts, against every token and every expert written out in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from memtrain.description import BuildContext, Dtypes
from memtrain.layers import Block, ModelConfig, MoE
from memtrain.memory import Context
from memtrain.model.flops import forward_flops
from memtrain.model.language_model import LanguageModel
from memtrain.parallel.config import MeshConfig
from memtrain.parallel.sharding import Split, partition_spec
from memtrain.testing import LAWS, check_laws
from memtrain.testing.placing import mesh_of_sizes


DIM, EXPERTS, HIDDEN = 16, 6, 10
PLAIN = MoE(EXPERTS, 2, hidden=HIDDEN, z_loss=1e-3)
WHOLE = dataclasses.replace(PLAIN, parallel="experts")
SHARED = MoE(5, 2, hidden=12, normalize=False, shared_hidden=8, shared_gate=True)


def built(config: MoE, dtypes: Dtypes = Dtypes(), seed: int = 0):  # noqa: B008 (frozen)
    return config.build(BuildContext(dim=DIM, dtypes=dtypes), rngs=nnx.Rngs(seed))


def law_instance(config: MoE):
    def make(dtypes: Dtypes, rngs: nnx.Rngs):
        return config.build(BuildContext(dim=DIM, dtypes=dtypes), rngs=rngs)

    return make


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def swiglu(x, gate, inward, outward):
    hidden = x @ gate
    return (hidden * sigmoid(hidden) * (x @ inward)) @ outward


def oracle(layer, x: np.ndarray, valid: np.ndarray):
    """Outputs, losses and metrics, in float64 and one token at a time."""
    config = layer.config
    double = lambda p: np.asarray(p[...], np.float64)  # noqa: E731
    router, gate, inward, outward = (
        double(p) for p in (layer.router.weight, layer.gate, layer.input, layer.output)
    )
    y = np.zeros(x.shape)
    load, mass, entropy, z = np.zeros(config.num_experts), 0.0, 0.0, 0.0
    for at in zip(*np.nonzero(valid), strict=True):
        scores = x[at] @ router
        p = np.exp(scores) / np.exp(scores).sum()
        chosen = np.argsort(-scores, kind="stable")[: config.top_k]
        weights = p[chosen] / (p[chosen].sum() if config.normalize else 1.0)
        for weight, e in zip(weights, chosen, strict=True):
            y[at] += weight * swiglu(x[at], gate[e], inward[e], outward[e])
        load[chosen] += 1
        mass, entropy = mass + p, entropy - (p * np.log(p)).sum()
        z += np.log(np.exp(scores).sum()) ** 2
        if config.shared_hidden:
            shared = layer.shared
            more = swiglu(
                x[at], *(double(w.weight) for w in (shared.gate, shared.input, shared.output))
            )
            y[at] += more * sigmoid(x[at] @ double(layer.shared_gate.weight))
    count = valid.sum()
    share = load / (count * config.top_k)
    balance = config.num_experts * (share * mass / count).sum()
    losses = {"balance": config.balance_loss * balance, "z": config.z_loss * z / count}
    metrics = {
        "balance": balance,
        "load_max": config.num_experts * share.max(),
        "experts_used": (load > 0).mean(),
        "router_entropy": entropy / count,
    }
    return y, {name: loss for name, loss in losses.items() if loss}, metrics


@pytest.mark.parametrize("config", [PLAIN, SHARED], ids=["plain", "shared"])
def test_every_token_and_expert_by_hand(config):
    layer = built(config)
    x = np.random.default_rng(0).normal(size=(2, 9, DIM))
    ctx = Context.of_documents(2, 9, want_metrics=True, want_reads=True)
    valid = np.ones((2, 9), bool)
    valid[1, 4:] = False
    ctx = dataclasses.replace(ctx, valid=jnp.asarray(valid))
    y, state, aux = nnx.jit(lambda layer, x: layer(x, None, ctx))(
        layer, jnp.asarray(x, jnp.float32)
    )
    assert state is None
    want, losses, metrics = oracle(layer, x, valid)
    np.testing.assert_allclose(np.asarray(y)[valid], want[valid], atol=1e-5)
    assert aux.losses == pytest.approx(losses, rel=1e-5) and aux.losses
    assert aux.metrics == pytest.approx(metrics, rel=1e-5)
    assert aux.reads["slots"].shape == aux.reads["weights"].shape == (2, 9, 2)


def dense(config, weights, x):
    """Every expert for every token, and a mask: gradients by autodiff."""
    p = jax.nn.softmax(x @ weights["router"], axis=-1)
    edge = jnp.sort(p, axis=-1)[..., -config.top_k, None]
    share = jnp.where(p >= edge, p, 0.0)
    share = share / share.sum(-1, keepdims=True)
    h = jax.nn.silu(jnp.einsum("btd,edf->btef", x, weights["gate"]))
    h = h * jnp.einsum("btd,edf->btef", x, weights["input"])
    return jnp.einsum("btef,efd,bte->btd", h, weights["output"], share)


def test_gradients_of_the_dense_mixture():
    layer = built(PLAIN)
    rng = np.random.default_rng(1)
    x, d = (jnp.asarray(rng.normal(size=(2, 9, DIM)), jnp.float32) for _ in range(2))
    ctx = Context.of_documents(2, 9)

    def sparse(layer, x):
        return jnp.sum(layer(x, None, ctx)[0] * d)

    mine, d_x = nnx.jit(nnx.grad(sparse, argnums=(0, 1)))(layer, x)
    weights = {
        "router": layer.router.weight[...],
        **{name: getattr(layer, name)[...] for name in ("gate", "input", "output")},
    }
    want, want_x = jax.jit(jax.grad(lambda w, x: jnp.sum(dense(PLAIN, w, x) * d), argnums=(0, 1)))(
        weights, x
    )
    np.testing.assert_allclose(d_x, want_x, atol=1e-4)
    np.testing.assert_allclose(mine.router.weight[...], want["router"], atol=1e-4)
    for name in ("gate", "input", "output"):
        assert np.abs(want[name]).max() > 0.05
        np.testing.assert_allclose(getattr(mine, name)[...], want[name], atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("config", [WHOLE, SHARED], ids=["whole experts", "shared"])
def test_every_law(config):
    report = check_laws(law_instance(config))
    assert [o.law for o in report.outcomes] == list(LAWS)
    assert all(o.status == "holds" for o in report.outcomes), str(report)


def test_equal_scores_go_to_the_first():
    layer = built(PLAIN)
    layer.router.weight.set_value(jnp.zeros_like(layer.router.weight[...]))
    weights, experts = layer.choose(layer.scores(jnp.ones((1, 3, DIM))))
    assert np.array_equal(experts, np.broadcast_to([0, 1], (1, 3, 2)))
    assert np.array_equal(weights, np.full((1, 3, 2), 0.5))


def test_what_the_tensor_axis_splits():
    """Of the inward matrices [E, D, F]: hidden units, or whole experts. D is split in storage."""
    mesh = mesh_of_sizes((2, 1, 2, 2))
    for config, stored, used in (
        (PLAIN, (None, "context", "tensor"), (None, None, "tensor")),
        (WHOLE, ("tensor", "context", None), ("tensor", None, None)),
    ):
        gate = built(config).gate
        axes = gate.get_metadata("logical_axes")
        assert partition_spec(axes, mesh, gate.shape) == PartitionSpec(*stored)
        assert Split(mesh).gathered(axes, gate.shape) == PartitionSpec(*used)


def test_a_mesh_that_does_not_divide_whole_experts_is_refused():
    with pytest.raises(ValueError, match=r"num_experts=6: mesh.tensor=4 does not divide it"):
        WHOLE.check_mesh(MeshConfig(tensor=4))
    PLAIN.check_mesh(MeshConfig(tensor=4))


def test_flops_are_those_of_the_chosen_experts():
    def flops(ffn):
        config = ModelConfig(dim=DIM, pattern=(Block(ffn=ffn),), repeats=3)
        model = nnx.eval_shape(lambda: LanguageModel(config, vocab_size=1, rngs=nnx.Rngs(0)))
        return forward_flops(model, 8).matmul - 2 * DIM

    assert flops(PLAIN) == 3 * 2 * (DIM * EXPERTS + 2 * 3 * DIM * HIDDEN)
    shared = DIM * 5 + 2 * 3 * DIM * 12 + 3 * DIM * 8 + DIM
    assert flops(SHARED) == 3 * 2 * shared


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_experts": 4, "top_k": 5}, "top_k=5: there are 4 experts"),
        ({"num_experts": 4, "top_k": 0}, "top_k=0: it takes 1 or more"),
        ({"num_experts": 4, "top_k": 1, "shared_gate": True}, "give shared_hidden"),
        ({"num_experts": 4, "top_k": 1, "balance_loss": -1.0}, "balance_loss=-1.0: it takes 0"),
    ],
)
def test_errors_say_what_fits(arguments, said):
    with pytest.raises(ValueError, match=said):
        MoE(**arguments)
