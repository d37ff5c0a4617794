"""The train step: loss, accumulation, skipping, freezing, carry. Oracles are written out here."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from memtrain.errors import BadInput
from memtrain.memory.protocol import Context
from memtrain.train.step import make_train_step


@pytest.fixture(scope="module")
def plain():
    plan = tiny.plan_of(tiny.experiment())
    return plan, make_train_step(plan)


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


def dense_loss(plan, parameters, batch):
    """Weighted mean cross-entropy from whole logits."""
    model = plan.skeleton.merge(parameters)
    ctx = Context(positions=batch.positions, starts=batch.starts, valid=batch.valid)
    hidden, _, _ = model(batch.tokens, None, ctx)
    log_p = jax.nn.log_softmax(model.logits(hidden))
    nll = -jnp.take_along_axis(log_p, batch.targets[..., None], -1)[..., 0]
    return jnp.sum(nll * batch.loss_weights) / batch.loss_weights.sum()


def test_loss_and_first_update_against_adamw_by_hand(plain):
    plan, step = plain
    state, batch = plan.init(), tiny.batch(0)
    before = copy(state.parameters)
    loss, grads = jax.jit(jax.value_and_grad(lambda p: dense_loss(plan, p, batch)))(before)
    after, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["train/loss"], loss, rtol=1e-5)

    config = plan.experiment.optimizer
    tables = plan.skeleton.tables
    for group, rate, clip in (
        (tables, config.table_learning_rate, config.table_clip_norm),
        (set(grads) - tables, config.learning_rate, config.clip_norm),
    ):
        norm = np.sqrt(sum(float(np.sum(np.square(grads[n], dtype=np.float64))) for n in group))
        for name in group:
            g = np.asarray(grads[name], np.float64) * min(1.0, clip / norm)
            # Adam's first step with bias correction is g / (|g| + epsilon).
            update = g / (np.abs(g) + config.epsilon)
            axes = [a for a in plan.skeleton.axes()[name] if a != "layers"]
            if len(axes) >= 2 and name not in tables:
                update += config.weight_decay * np.asarray(before[name], np.float64)
            expected = np.asarray(before[name], np.float64) - rate / config.warmup_steps * update
            moved = np.abs(g) > 1e-7  # below it float32 noise decides the sign
            np.testing.assert_allclose(
                np.asarray(after.parameters[name])[moved], expected[moved], rtol=2e-3, atol=2e-5
            )


def test_accumulation_is_the_whole_batch(plain):
    plan, step = plain
    batch = tiny.batch(1)
    _whole, whole_metrics = step(plan.init(), batch)
    parts = tiny.plan_of(tiny.experiment(accumulation_steps=4))
    _state, metrics = make_train_step(parts)(parts.init(), batch)
    np.testing.assert_allclose(metrics["train/loss"], whole_metrics["train/loss"], rtol=1e-5)
    np.testing.assert_allclose(
        metrics["train/grad_norm"], whole_metrics["train/grad_norm"], rtol=1e-4
    )


def test_a_non_finite_step_changes_nothing_and_is_counted():
    plan = tiny.plan_of(tiny.with_train(tiny.experiment(windows_only=True), carry="none"))
    config = dataclasses.replace(
        plan.experiment,
        data=dataclasses.replace(plan.experiment.data, order="document"),
        train=dataclasses.replace(plan.experiment.train, carry="stop"),
    )
    plan = tiny.plan_of(config)
    step = make_train_step(plan)
    state, _ = step(plan.init(), tiny.batch(2))
    before = copy(state)
    bad = tiny.batch(3)._replace(loss_weights=np.full((8, 12), np.inf, np.float32))
    after, metrics = step(state, bad)
    for part in ("parameters", "optimizer", "carry"):
        old, new = getattr(before, part), getattr(after, part)
        assert all(map(np.array_equal, jax.tree.leaves(old), jax.tree.leaves(new))), part
    assert int(after.step) == 2
    assert int(after.skipped) == int(metrics["train/skipped_in_row"]) == 1
    after, metrics = step(after, tiny.batch(4))
    assert int(after.skipped) == 1 and int(metrics["train/skipped_in_row"]) == 0
    # Warm-up over three steps: the second update is made at its second rate, skip or no skip.
    np.testing.assert_allclose(metrics["train/learning_rate"], 1e-2 * 2 / 3, rtol=1e-5)
    assert not np.array_equal(before.parameters["embedding"], after.parameters["embedding"])


@pytest.mark.full
def test_frozen_parameters_do_not_move():
    plan = tiny.plan_of(tiny.experiment(freeze=("embed*", "blocks.0.*", "tables.*")))
    state = plan.init()
    before = copy(state.parameters)
    after, _ = make_train_step(plan)(state, tiny.batch(5))
    still = {n for n in before if np.array_equal(before[n], after.parameters[n])}
    expected = {n for n in before if n.startswith(("embed", "blocks.0.", "tables."))}
    assert still == expected
    assert expected and expected != set(before)


def test_freezing_nothing_that_exists_is_refused():
    with pytest.raises(BadInput, match="embeding"):
        tiny.plan_of(tiny.experiment(freeze=("embeding",)))


@pytest.mark.full
def test_carry_is_the_state_of_the_memories():
    """Two steps with carry read the second segment as a model does that has read the first."""
    config = tiny.experiment(windows_only=True)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, order="document"),
        train=dataclasses.replace(config.train, carry="stop"),
        # A rate of zero: both steps see the same parameters.
        optimizer=dataclasses.replace(
            config.optimizer, learning_rate=0.0, table_learning_rate=0.0, warmup_steps=0
        ),
    )
    plan = tiny.plan_of(config)
    step = make_train_step(plan)
    whole = tiny.batch(6, length=24)._replace(valid=np.ones((8, 24), bool))
    first = whole._replace(**{f: getattr(whole, f)[:, :12] for f in whole._fields})
    second = whole._replace(**{f: getattr(whole, f)[:, 12:] for f in whole._fields})
    state = plan.init()
    parameters = copy(state.parameters)
    state, _ = step(state, first)
    _, metrics = step(state, second)
    late = np.concatenate([np.zeros((8, 12)), np.ones((8, 12))], axis=1).astype(np.float32)
    dense = jax.jit(lambda batch: dense_loss(plan, parameters, batch))
    expected = dense(whole._replace(loss_weights=whole.loss_weights * late))
    np.testing.assert_allclose(metrics["train/loss"], expected, rtol=1e-5)
    alone = dense(second)
    assert abs(float(alone) - float(expected)) > 1e-4  # the memory matters


def test_a_memory_that_grows_cannot_be_carried():
    config = tiny.experiment()
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, order="document"),
        train=dataclasses.replace(config.train, carry="stop"),
    )
    with pytest.raises(BadInput, match=r"layer 1 \(mixer\) grows with every token"):
        tiny.plan_of(config)


@pytest.mark.full
def test_scan_and_remat_change_no_gradient(plain):
    plan, _ = plain
    batch = tiny.batch(7)
    config = plan.experiment
    results, parameters = [], None
    for unroll, remat in ((None, "none"), (1, "none"), (1, "full"), (None, "dots")):
        model = dataclasses.replace(config.model, repeats=2, scan_unroll=unroll, remat=remat)
        varied = tiny.plan_of(dataclasses.replace(config, model=model))
        parameters = parameters or varied.init().parameters
        gradient = jax.jit(jax.value_and_grad(lambda p, v=varied: dense_loss(v, p, batch)))
        results.append(gradient(parameters))
    for other in results[1:]:
        for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(np.abs(a).max())))


def test_a_shared_table_is_one_leaf(plain):
    plan, _ = plain
    model = dataclasses.replace(plan.experiment.model, repeats=3)
    shared = tiny.plan_of(dataclasses.replace(plan.experiment, model=model))
    leaves = [n for n, s in shared.skeleton.shapes.items() if s.shape[-2:] == (64, 16)]
    assert leaves == ["tables.memory"]
    assert shared.skeleton.shapes["tables.memory"].shape == (64, 16)
    moments = [
        leaf for leaf in jax.tree.leaves(shared.shapes().optimizer) if leaf.shape == (64, 16)
    ]
    assert len(moments) == 2


def test_learning_rate_schedules_by_hand():
    from memtrain.train.config import OptimizerConfig
    from memtrain.train.optimizer import schedule_of

    cosine = schedule_of(OptimizerConfig(learning_rate=1.0, warmup_steps=4, final_fraction=0.1), 24)
    found = np.array([cosine(i) for i in range(4)], np.float32)
    np.testing.assert_allclose(found, [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(cosine(14), 0.1 + 0.9 * 0.5, rtol=1e-5)
    np.testing.assert_allclose(cosine(24), 0.1, rtol=1e-5)
    wsd = schedule_of(
        OptimizerConfig(
            learning_rate=2.0,
            schedule="wsd",
            warmup_steps=4,
            decay_fraction=0.25,
            final_fraction=0.0,
        ),
        40,
    )
    found = np.array([wsd(i) for i in (10, 29, 35, 40)], np.float32)
    np.testing.assert_allclose(found, [2, 2, 1, 0], atol=1e-6)
    held = schedule_of(OptimizerConfig(learning_rate=1.0, warmup_steps=0, horizon_steps=10), 99)
    np.testing.assert_allclose(held(10), 0.1, rtol=1e-5)


def test_optimizer_moments_live_with_their_parameter():
    from memtrain.parallel.config import MeshConfig

    plan = tiny.plan_of(tiny.experiment(mesh=MeshConfig(data=2, fsdp=4)))
    state = plan.init()
    where: dict[str, Any] = {n: a.sharding for n, a in state.parameters.items()}
    assert tuple(where["tables.memory"].spec) == ("fsdp", None)
    found = 0
    flat, _ = jax.tree_util.tree_flatten_with_path(state.optimizer)
    for path, leaf in flat:
        names = [e.key for e in path if getattr(e, "key", None) in where]
        if names and leaf.shape == state.parameters[names[0]].shape:
            assert leaf.sharding == where[names[0]]
            found += 1
    assert found == 2 * len(where)
    assert isinstance(plan.optimizer, optax.GradientTransformation)
