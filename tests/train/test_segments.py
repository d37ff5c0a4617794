"""Rows in segments: the loss, gradients and state of rows in one piece, with less held at once."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from memtrain.config import Experiment
from memtrain.errors import BadInput
from memtrain.layers import Block, GatedDelta, Mamba2, SwiGLU, Window
from memtrain.parallel.config import MeshConfig
from memtrain.train.step import make_loss_and_gradients, make_train_step


LENGTH = 24


def experiment(segments: int, length: int = LENGTH, **train) -> Experiment:
    """A window, a delta rule, Mamba-2 and a table of which the rows that were read are summed."""
    base = tiny.carried(tiny.experiment(windows_only=True, seq_len=length))
    pattern = (
        Block(mixer=Window(5, num_heads=2, sink_tokens=1), ffn=tiny.TABLE),
        Block(mixer=GatedDelta(num_heads=2, head_dim=4), ffn=SwiGLU(hidden=32)),
        Block(mixer=Mamba2(head_dim=8, state_dim=4), ffn=tiny.TABLE),
    )
    carry = {"carry": "tbptt", "tbptt_segments": segments} if segments > 1 else {}
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, pattern=pattern),
        train=dataclasses.replace(base.train, **carry, **train),
        optimizer=dataclasses.replace(base.optimizer, table_gradient="rows"),
    )


@pytest.mark.full
def test_the_same_loss_gradients_and_state_as_in_one_piece():
    found = {}
    # Its documents go on from the batch before.
    second = tiny.batch(2, length=LENGTH)
    starts = second.starts & (np.arange(LENGTH) > 0)
    goes_on = np.cumsum(starts, axis=1) == 0
    second = second._replace(starts=starts, positions=second.positions + 100 * goes_on)
    for segments in (1, 3):
        plan = tiny.plan_of(experiment(segments))
        function = jax.jit(make_loss_and_gradients(plan))
        state = plan.init()
        _, carry, _, _ = function(state.parameters, tiny.batch(1, length=LENGTH), state.carry)
        found[segments] = function(state.parameters, second, carry)
        fresh = function(state.parameters, second, state.carry)
        assert abs(fresh[0] - found[segments][0]) > 1e-3  # what was carried in is felt
    (loss, carry, metrics, gradients), (loss_3, carry_3, metrics_3, gradients_3) = found.values()
    np.testing.assert_allclose(loss, loss_3, rtol=1e-5)
    assert metrics.keys() == metrics_3.keys()
    for name, gradient in gradients.items():
        leaves = jax.tree.leaves(gradient), jax.tree.leaves(gradients_3[name])
        for a, b in zip(*leaves, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4 * max(np.abs(a).max(), 1e-6), err_msg=name)
    for a, b in zip(jax.tree.leaves(carry), jax.tree.leaves(carry_3), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.full
def test_accumulation_and_segments_together():
    whole = tiny.plan_of(experiment(1))
    parts = tiny.plan_of(experiment(3, accumulation_steps=2))
    batch = tiny.batch(3, length=LENGTH)
    _, metrics = make_train_step(whole)(whole.init(), batch)
    _, in_parts = make_train_step(parts)(parts.init(), batch)
    for name in ("train/loss", "train/grad_norm", "train/table_grad_norm"):
        np.testing.assert_allclose(in_parts[name], metrics[name], rtol=1e-4)


@pytest.mark.full
def test_only_one_segment_is_held():
    held = {}
    for segments in (1, 8):
        plan = tiny.plan_of(experiment(segments, length=2048))
        function = jax.jit(make_loss_and_gradients(plan))
        state = jax.eval_shape(plan.init)
        batch = jax.eval_shape(lambda: tiny.batch(0, length=2048))
        program = function.lower(state.parameters, batch, state.carry).compile()
        held[segments] = program.memory_analysis().temp_size_in_bytes
    assert held[8] < 0.4 * held[1], held


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"carry": "tbptt"}, r'tbptt_segments=1, train.carry="tbptt": carry="tbptt" takes 2'),
        ({"carry": "stop", "tbptt_segments": 3}, r'tbptt_segments=3, train.carry="stop"'),
        ({"carry": "tbptt", "tbptt_segments": 5}, "seq_len=12 cannot be cut .* take 10 or 15"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        tiny.with_train(tiny.experiment(windows_only=True), **change)


def test_shuffled_data_and_a_context_axis_are_refused():
    config = experiment(3)
    with pytest.raises(BadInput, match=r'carry="tbptt" carries .* set data.order="document"'):
        dataclasses.replace(config, data=dataclasses.replace(config.data, order="packed"))
    with pytest.raises(BadInput, match=r"reads a row in parts, and mesh.context=2"):
        dataclasses.replace(config, mesh=MeshConfig(context=2))
