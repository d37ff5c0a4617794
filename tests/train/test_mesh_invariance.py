"""The same run on every factorisation of the devices: the same losses, leaf by leaf gradients.

Documents are packed, of random lengths that nothing divides, with a padded tail. The bounds are the
loss to 1e-5 and every gradient to 1e-4 of its leaf's greatest element.
"""

import functools
import itertools
import math

import jax
import numpy as np
import pytest
import tiny

from memtrain.errors import BadInput
from memtrain.parallel.config import MeshConfig
from memtrain.parallel.mesh import mesh_of
from memtrain.train.step import make_loss_and_gradients, make_train_step


ROWS, LENGTH = 4, 48
SEED = 0

# Every axis alone and every pair, every strategy, layout and accumulation, in few programs.
COVERING = [
    {"data": 2, "fsdp": 2, "context": 2},
    {"context": 4, "tensor": 2},
    {"context": 8, "context_layout": "striped"},
    {"fsdp": 2, "context": 2, "tensor": 2, "context_strategy": "all_gather"},
    {"data": 4, "tensor": 2, "accumulation_steps": 1},
    {"data": 2, "context": 2, "context_strategy": "ulysses", "accumulation_steps": 2},
    {"fsdp": 4, "context": 2, "context_layout": "contiguous"},
]
FACTORISATIONS = [
    dict(zip(("data", "fsdp", "context", "tensor"), sizes, strict=True))
    for sizes in itertools.product((1, 2, 4, 8), repeat=4)
    if 1 < math.prod(sizes) <= 8 and sizes[0] * sizes[1] <= ROWS
]


@functools.cache
def first_parameters() -> dict[str, np.ndarray]:
    """They do not depend on the mesh: see below."""
    return jax.device_get(tiny.plan_of(tiny.experiment()).init().parameters)


def gradients(accumulation_steps: int = 1, **mesh):
    config = tiny.experiment(
        mesh=MeshConfig(**mesh),
        seq_len=LENGTH,
        batch_size=ROWS,
        accumulation_steps=accumulation_steps,
    )
    plan = tiny.plan_of(config)
    batch = tiny.batch(SEED, rows=ROWS, length=LENGTH)
    placed = jax.device_put(first_parameters(), plan.skeleton.shardings(plan.mesh))
    loss, _, _, found = jax.jit(make_loss_and_gradients(plan))(placed, batch, None)
    return float(loss), jax.tree.map(np.asarray, found)


@functools.cache
def on_one_device():
    return gradients()


def assert_same(got, want) -> None:
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    for name, leaf in want[1].items():
        error = np.abs(got[1][name] - leaf).max()
        assert error <= 1e-4 * np.abs(leaf).max(), (
            f"{name}: {error:.2e} of {np.abs(leaf).max():.2e}"
        )


@pytest.mark.parametrize(
    "mesh",
    [pytest.param(m, marks=pytest.mark.full if i else ()) for i, m in enumerate(COVERING)],
    ids=str,
)
def test_loss_and_gradients_are_those_of_one_device(mesh):
    assert_same(gradients(**mesh), on_one_device())


def test_every_leaf_has_a_gradient():
    """Or else its bound, a share of its greatest element, says nothing."""
    assert all(np.abs(leaf).max() > 0 for leaf in on_one_device()[1].values())


@pytest.mark.slow
@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("mesh", FACTORISATIONS, ids=str)
def test_every_factorisation_of_eight_devices(mesh, accumulation_steps):
    parts = mesh["data"] * mesh["fsdp"] * accumulation_steps
    if ROWS % parts:
        pytest.skip(f"{ROWS} rows do not make {parts} parts")
    assert_same(gradients(accumulation_steps, **mesh), on_one_device())


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("strategy", ["ring", "ulysses", "usp", "all_gather"])
def test_every_strategy_in_every_layout(strategy, layout):
    mesh = {"context": 2, "tensor": 1, "data": 2}
    got = gradients(context_strategy=strategy, context_layout=layout, **mesh)
    assert_same(got, on_one_device())


def tiny_plan(windows_only: bool, carry: bool, **mesh):
    config = tiny.experiment(
        mesh=MeshConfig(**mesh),
        windows_only=windows_only,
        seq_len=16,
    )
    return tiny.plan_of(tiny.carried(config) if carry else config)


@functools.cache
def first_state(windows_only: bool, carry: bool):
    return jax.device_get(tiny_plan(windows_only, carry).init())


def losses(steps: int = 20, *, windows_only: bool = False, carry: bool = False, **mesh):
    plan = tiny_plan(windows_only, carry, **mesh)
    step, state = make_train_step(plan), first_state(windows_only, carry)
    # Not the host's own memory: a step takes over what it is given.
    state = jax.device_put(state, plan.shardings(), may_alias=False)
    found = []
    for i in range(steps):
        state, metrics = step(state, tiny.batch(i, length=16))
        found.append(float(metrics["train/loss"]))
    return found


@pytest.fixture(scope="module")
def one_device() -> list[float]:
    return losses()


@pytest.mark.full
@pytest.mark.parametrize(
    "mesh",
    [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 4}, {"context": 4, "tensor": 2}],
    ids=str,
)
def test_first_20_losses_are_those_of_one_device(one_device, mesh):
    np.testing.assert_allclose(losses(**mesh), one_device, rtol=1e-5)
    assert one_device[-1] < one_device[0]


@pytest.mark.full
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_carried_memories_go_on_over_the_context_axis(layout):
    """Windows with sinks, their rings of keys sharded, from step to step."""
    got = carried(context=4, data=2, context_layout=layout)
    np.testing.assert_allclose(got, carried_on_one_device(), rtol=1e-5)


carried = functools.partial(losses, 6, windows_only=True, carry=True)


@functools.cache
def carried_on_one_device() -> list[float]:
    return carried()


def test_fresh_parameters_do_not_depend_on_the_mesh():
    one = tiny.plan_of(tiny.experiment()).init().parameters
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    eight = tiny.plan_of(tiny.experiment(mesh=mesh)).init().parameters
    for name, array in one.items():
        # A device's part may be rounded in another order: by one unit in the last place, no more.
        np.testing.assert_allclose(array, eight[name], rtol=1e-6, atol=1e-7, err_msg=name)
        assert len(eight[name].sharding.device_set) == 8


def test_meshes_that_cannot_be_are_refused_in_one_line():
    with pytest.raises(BadInput, match="there are 8"):
        mesh_of(MeshConfig(data=3, fsdp=4), jax.devices()[:8])


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (
            {"context": 8},
            r"seq_len=12 cannot be split over mesh\.context=8: the zigzag.*nearest 16",
        ),
        ({"context": 5, "context_layout": "contiguous"}, "multiples of 5; nearest 10 or 15"),
        ({"context": 6, "context_strategy": "ulysses"}, "cannot divide 2 query and 2 key heads"),
        ({"context": 2, "context_ulysses": 2}, "is for mesh.context_strategy=usp"),
        (
            {"context": 6, "context_strategy": "usp", "context_ulysses": 3},
            "degrees that fit are 1, 2",
        ),
    ],
)
def test_sequences_and_heads_that_cannot_be_split_are_refused(mesh, words):
    config = tiny.experiment(mesh=MeshConfig(**mesh))
    with pytest.raises(BadInput, match=words):
        tiny.plan_of(config)
