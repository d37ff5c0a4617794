"""The same run on every factorisation of the devices: the same losses, leaf by leaf gradients."""

import jax
import numpy as np
import pytest
import tiny

from memtrain.errors import BadInput
from memtrain.parallel.config import MeshConfig
from memtrain.parallel.mesh import mesh_of
from memtrain.train.step import make_train_step


MESHES = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (4, 1), (8, 1), (1, 8), (2, 4), (4, 2)]


def losses(data: int, fsdp: int, steps: int = 20) -> list[float]:
    plan = tiny.plan_of(tiny.experiment(mesh=MeshConfig(data=data, fsdp=fsdp)))
    step, state = make_train_step(plan), plan.init()
    found = []
    for i in range(steps):
        state, metrics = step(state, tiny.batch(i))
        found.append(float(metrics["train/loss"]))
    return found


@pytest.fixture(scope="module")
def one_device() -> list[float]:
    return losses(1, 1)


@pytest.mark.full
@pytest.mark.parametrize(("data", "fsdp"), MESHES[1:])
def test_first_20_losses_are_those_of_one_device(one_device, data, fsdp):
    np.testing.assert_allclose(losses(data, fsdp), one_device, rtol=1e-5)
    assert one_device[-1] < one_device[0]


def test_fresh_parameters_do_not_depend_on_the_mesh():
    one = tiny.plan_of(tiny.experiment()).init().parameters
    eight = tiny.plan_of(tiny.experiment(mesh=MeshConfig(data=2, fsdp=4))).init().parameters
    for name, array in one.items():
        # A device's part may be rounded in another order: by one unit in the last place, no more.
        np.testing.assert_allclose(array, eight[name], rtol=1e-6, atol=1e-7, err_msg=name)
        assert len(eight[name].sharding.device_set) == 8


def test_meshes_that_cannot_be_are_refused_in_one_line():
    with pytest.raises(BadInput, match="there are 8"):
        mesh_of(MeshConfig(data=3, fsdp=4), jax.devices()[:8])
    with pytest.raises(BadInput, match=r"mesh\.context=2"):
        mesh_of(MeshConfig(context=2))
