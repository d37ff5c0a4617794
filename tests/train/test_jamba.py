"""A model in Jamba's shape (Mamba, attention, mixtures of experts) trains on a mesh and decodes."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from memtrain.decode.export import export_model
from memtrain.layers import Attention, Block, Mamba1, ModelConfig, MoE, SwiGLU
from memtrain.parallel.config import MeshConfig
from memtrain.train.step import make_loss_and_gradients, make_train_step


pytestmark = pytest.mark.full

ROWS, LENGTH = 4, 48
MAMBA = Mamba1(state_dim=4, inner_norm=True)
EXPERTS = MoE(4, 2, hidden=16, normalize=False, balance_loss=1.0)
MODEL = ModelConfig(
    dim=16,
    pattern=(
        Block(mixer=MAMBA, ffn=EXPERTS),
        Block(mixer=Attention(num_heads=2, rope_theta=None, qk_norm=False), ffn=SwiGLU(hidden=32)),
    ),
    loss_chunk_tokens=24,
)


def plan_on(**mesh: int):
    config = tiny.experiment(mesh=MeshConfig(**mesh), seq_len=LENGTH, batch_size=ROWS)
    return tiny.plan_of(dataclasses.replace(config, model=MODEL))


@pytest.fixture(scope="module")
def parameters() -> dict[str, np.ndarray]:
    """The router's made wide, so that experts differ in what they are sent."""
    found = jax.device_get(plan_on().init().parameters)
    (router,) = (name for name in found if name.endswith("router.weight"))
    return found | {router: 4 * found[router]}


def gradients(parameters, **mesh):
    plan = plan_on(**mesh)
    placed = jax.device_put(parameters, plan.skeleton.shardings(plan.mesh))
    batch = tiny.batch(0, rows=ROWS, length=LENGTH)
    loss, _, metrics, found = jax.jit(make_loss_and_gradients(plan))(placed, batch, None)
    metrics = {name: float(value) for name, value in metrics.items()}
    return float(loss), metrics, jax.tree.map(np.asarray, found)


def test_a_mesh_gives_what_one_device_does(parameters):
    loss, metrics, want = gradients(parameters)
    mesh_loss, mesh_metrics, found = gradients(parameters, fsdp=2, context=2, tensor=2)
    assert mesh_loss == pytest.approx(loss, rel=1e-5)
    assert mesh_metrics == pytest.approx(metrics, rel=1e-5)
    assert metrics["0.ffn.load_max"] > 1.2 and "0.ffn.balance" in metrics
    for name, gradient in found.items():
        bound = 1e-4 * np.abs(want[name]).max()
        np.testing.assert_allclose(gradient, want[name], atol=bound, err_msg=name)


def test_the_balance_loss_reaches_the_router(parameters):
    """Training it alone, the loads come together."""
    plan = plan_on()
    state = plan.init()
    state = dataclasses.replace(state, parameters=jax.device_put(parameters))
    step = make_train_step(plan)
    batch = tiny.batch(0, rows=ROWS, length=LENGTH)
    balance = []
    for _ in range(12):
        state, metrics = step(state, batch)
        balance.append(float(metrics["memory/0.ffn.balance"]))
    assert balance[-1] < balance[0] - 0.03


def test_it_decodes_what_it_was_trained_to_say(parameters, tmp_path):
    """Export compares decoding in every way with the training forward before it says ok."""
    plan = plan_on()
    model = plan.skeleton.merge(jax.device_put(parameters))
    made = export_model(
        model, plan.experiment, None, tmp_path / "jamba.mtx", {"run": "jamba"}, programs=False
    )
    found = made["checked"]["float32"]["token_by_token"]
    assert found["greedy_differs"] == 0 and found["max_difference"] < 1e-4
