"""A state that does not fit is refused before it is made, with what would fit."""

import dataclasses

import pytest

from memtrain.errors import BadInput
from memtrain.layers import Block, ProductKeyMemory
from memtrain.parallel.config import MeshConfig
from memtrain.train.room import check_room
from tests.helpers import tiny


def with_table(slots, mesh=None, **optimizer):
    base = tiny.experiment(mesh=mesh)
    table = ProductKeyMemory(num_slots=slots, num_heads=1, top_k=1, key_dim=2, value_dim=16)
    pattern = (*base.model.pattern[:1], Block(mixer=None, ffn=table))
    model = dataclasses.replace(base.model, pattern=pattern)
    config = dataclasses.replace(base.optimizer, **optimizer)
    return tiny.plan_of(dataclasses.replace(base, model=model, optimizer=config))


def test_the_table_is_named_and_what_would_fit_does():
    # A row is 16 numbers and two moments of each in float32, and two counts: 200 bytes.
    plan, available = with_table(1024**2), 2**27
    with pytest.raises(BadInput) as refused:
        check_room(plan, available)
    text = str(refused.value)
    assert "table 'memory' of 1,048,576 slots takes 0.2 GiB of it" in text
    assert "of each device's 0.1 GiB" in text
    fits = int(text.split("num_slots=")[1].split(" ")[0].replace(",", ""))
    assert 0.95 * (0.97 * available / 200) < fits < 0.97 * available / 200
    check_room(with_table(fits), available)
    check_room(with_table(1024**2, MeshConfig(fsdp=2)), available)
    check_room(plan, None)


def test_without_a_table_the_model_is_too_large():
    base = tiny.experiment()
    model = dataclasses.replace(base.model, pattern=base.model.pattern[:1])
    plan = tiny.plan_of(dataclasses.replace(base, model=model))
    with pytest.raises(BadInput, match="make the model smaller, or split it over more devices"):
        check_room(plan, 1000)
    check_room(plan, 2**20)
