"""Tables and moments in host memory: the same training, and nothing of their size on the device."""

import dataclasses

import jax
import numpy as np
import pytest

from memtrain.config import override
from memtrain.data.config import DataConfig
from memtrain.errors import BadInput
from memtrain.model.parameters import parameters_of
from memtrain.parallel.config import MeshConfig
from memtrain.parallel.sharding import batch_sharding
from memtrain.train.load import load_model
from memtrain.train.room import check_room
from memtrain.train.run import train
from memtrain.train.step import abstract_batch, make_evaluation_step, make_train_step
from tests.helpers import tiny

from .test_lazy_tables import NAME, experiment


def kinds(state) -> dict[str, str]:
    """Where the table, each array of its moments, and all else live."""
    found = {"table": state.parameters[NAME].sharding.memory_kind}
    for name, leaf in state.optimizer.tables[NAME]._asdict().items():
        if leaf is not None:
            found[name] = leaf.sharding.memory_kind
    others = {a.sharding.memory_kind for n, a in state.parameters.items() if n != NAME}
    others |= {a.sharding.memory_kind for a in jax.tree.leaves(state.optimizer.main)}
    (found["others"],) = others
    return found


def trained(config, steps=3):
    plan = tiny.plan_of(config)
    step, state = make_train_step(plan), plan.init()
    losses = []
    for seed in range(steps):
        batch = jax.device_put(tiny.batch(seed), batch_sharding(plan.mesh))
        state, metrics = step(state, batch)
        losses.append(float(metrics["train/loss"]))
    return plan, state, losses


def on_host(config):
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, table_memory="host"))


@pytest.mark.full
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"scan_unroll": 1, "accumulation": 2},
        {"mesh": MeshConfig(fsdp=2, context=2, tensor=2)},
        {"mesh": MeshConfig(data=4, tensor=2), "tables": "bfloat16", "table_rounding": "master"},
    ],
    ids=["one device", "scanned in parts", "rows and columns over devices", "float32 copy"],
)
def test_a_table_in_host_memory_is_trained_alike(changed):
    config = experiment(table_gradient="rows", **changed)
    _, there, theirs = trained(config)
    plan, here, ours = trained(on_host(config))
    default = jax.devices()[0].default_memory().kind
    where = kinds(here)
    assert where.pop("others") == default
    assert set(where.values()) == {"pinned_host"} and len(where) >= 5
    assert set(kinds(there).values()) == {default}
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    pairs = [(here.parameters[NAME], there.parameters[NAME])]
    pairs += zip(*map(jax.tree.leaves, (m.optimizer.tables for m in (here, there))), strict=True)
    for a, b in pairs:
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max()))
    batch = jax.device_put(tiny.batch(9), batch_sharding(plan.mesh))
    found, _ = make_evaluation_step(plan)(here.parameters, batch, None)
    wanted, _ = make_evaluation_step(tiny.plan_of(config))(there.parameters, batch, None)
    np.testing.assert_allclose(found["nll"], wanted["nll"], rtol=1e-5)


def test_the_step_keeps_nothing_of_the_tables_size_on_the_device():
    """65,536 rows of 16 in float32 are 4 MiB, and so is each moment."""
    plan = tiny.plan_of(on_host(experiment(slots=65_536, repeats=1)))
    step = make_train_step(plan).lower(plan.abstract(), abstract_batch(plan)).compile()
    memory = step.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 2 << 20
    assert plan.tables.by_rows == {NAME}


def test_tables_are_made_where_they_live(monkeypatch):
    """The same numbers as on the devices, and no program of a device makes one of them."""
    config = experiment(slots=4096, tables="bfloat16", table_rounding="master")
    there = tiny.plan_of(config).init()
    plan = tiny.plan_of(on_host(config))
    made = []
    jit = jax.jit

    def watched(function, **options):
        program = jit(function, **options)

        def call(*args):
            made.extend(leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(program, *args)))
            return program(*args)

        return call if "out_shardings" in options else program

    monkeypatch.setattr(jax, "jit", watched)
    here = plan.init()
    assert made and (4096, 16) not in made
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    assert set(kinds(here).values()) == {"pinned_host", jax.devices()[0].default_memory().kind}
    again = plan.placed_optimizer(here.parameters)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(here.optimizer), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)


def test_a_table_that_is_not_trained_stays_on_the_devices():
    frozen = override(experiment(), ["train.freeze=tables.*"])
    with pytest.raises(BadInput, match=r"mesh\.table_memory=host: no memory table is trained"):
        tiny.plan_of(on_host(frozen))


def test_host_memory_has_an_end(monkeypatch):
    plan = tiny.plan_of(on_host(experiment(slots=65_536)))
    with pytest.raises(BadInput, match=r"mesh\.table_memory=host: tables and their moments take"):
        check_room(plan, 1 << 20)
    check_room(plan, 1 << 30)


@pytest.mark.full
def test_a_run_moves_between_host_and_devices(tmp_path):
    """Where tables live is operational: a run stops on one side and goes on on the other."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    config = dataclasses.replace(
        experiment(slots=4096, repeats=1),
        data=DataConfig(path=(str(tmp_path / "text.txt"),), validation_fraction=0.0),
    )
    config = override(
        config,
        ["train.num_steps=4", "train.checkpoint_every_steps=2", "optimizer.horizon_steps=4"],
    )
    quiet = lambda line: None  # noqa: E731
    train(config, tmp_path / "whole", progress=quiet)
    said: list[str] = []
    train(override(on_host(config), ["train.num_steps=2"]), tmp_path / "run", progress=said.append)
    train(config, tmp_path / "run", progress=said.append)
    assert "mesh.table_memory: host -> device" in said
    ours, theirs = (parameters_of(load_model(tmp_path / n).model) for n in ("run", "whole"))
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, atol=1e-5, err_msg=name)
    again = train(
        override(on_host(config), ["train.num_steps=5"]), tmp_path / "run", progress=quiet
    )
    assert again["step"] == 5


def test_what_would_bring_the_table_to_the_devices_is_refused():
    for fields, key in (
        ({"table_gradient": "dense"}, "table_gradient"),
        ({"table_update": "dense"}, "table_update"),
    ):
        with pytest.raises(BadInput, match=rf"mesh\.table_memory=host: optimizer\.{key}=dense"):
            tiny.plan_of(on_host(experiment(**fields)))
