"""Bytes between devices and the time of a step, against sums by hand."""

import dataclasses
from typing import Any

import pytest

from memtrain.config import Experiment
from memtrain.description import Dtypes
from memtrain.layers import Attention, Block, ModelConfig, ProductKeyMemory, SwiGLU
from memtrain.model.flops import Flops
from memtrain.parallel.config import MeshConfig
from memtrain.plan.devices import DEVICES
from memtrain.plan.layers import kinds_of_layers
from memtrain.plan.memory import estimate_memory
from memtrain.plan.roofline import ASSUMED, StepTime, predict
from memtrain.plan.traffic import transfers
from memtrain.train.config import TrainConfig


BF16 = Dtypes(compute="bfloat16", matmul="bfloat16")
BLOCK = Block(mixer=Attention(num_heads=8, num_kv_heads=4, head_dim=16), ffn=SwiGLU(hidden=256))
# Parameters by which axes split them; norms are on every device.
LINEAR = 3 * (2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 256)
EMBEDDING = 512 * 64


def experiment(*pattern: Any, mesh: MeshConfig | None = None, **model: Any) -> Experiment:
    return Experiment(
        name="x",
        model=ModelConfig(
            **{"dim": 64, "repeats": 3, "dtypes": BF16, "pattern": pattern or (BLOCK,), **model}
        ),
        train=TrainConfig(batch_size=8, seq_len=1024),
        mesh=mesh or MeshConfig(),
    )


def sent(shape: Experiment) -> dict[str, float]:
    memory = estimate_memory(shape, 512, "tpu")
    return {t.name: t.bytes for t in transfers(shape, memory, 512)}


def test_one_device_sends_nothing():
    assert sent(experiment()) == {}


def test_replicas_sum_their_gradients():
    norms = 3 * (2 * 64 + 2 * 16) + 64
    total = 4 * (LINEAR + EMBEDDING + norms)
    assert sent(experiment(mesh=MeshConfig(data=4))) == {
        "sum gradients over replicas": 2 * total * 3 / 4
    }


@pytest.mark.parametrize("axis", ["fsdp", "context"])
def test_shards_gather_weights_twice_and_scatter_gradients_once(axis: str):
    sizes: dict[str, Any] = {axis: 4}
    found = sent(experiment(mesh=MeshConfig(**sizes)))
    lacking = 4 * (LINEAR + EMBEDDING) * 3 / 4
    assert found["gather weights"] == 2 * lacking
    assert found["scatter gradients"] == lacking
    assert "sum gradients over replicas" not in found


def test_a_ring_sends_keys_and_values_and_their_gradients():
    found = sent(experiment(mesh=MeshConfig(context=4)))
    # Three hops of three layers; 2 of 4 heads of 16 for 8 rows of 256 tokens: forward and backward
    # in bfloat16, and gradients in float32.
    hop = 8 * 256 * 2 * 4 * 16
    assert found["keys and values over context"] == 3 * 3 * hop * (2 + 2 + 4)


def test_tensor_sums_the_residual_stream_after_each_place():
    found = sent(experiment(mesh=MeshConfig(tensor=2)))
    stream = 8 * 1024 * 64 * 2
    # Two places of three layers, forward and backward; a ring's all-reduce sends twice a half.
    assert found["sum activations over tensor"] == 2 * 3 * 2 * (2 * stream / 2)


def test_lookups_in_a_sharded_table():
    table = ProductKeyMemory(num_slots=64, num_heads=2, top_k=3, key_dim=8, value_dim=32)
    found = sent(experiment(Block(ffn=table), mesh=MeshConfig(fsdp=4)))
    # 2 rows of 1,024 tokens: six slots and weights out to three others, two vectors of 32 float32.
    assert found["table lookups"] == 3 * 2 * 1024 * 3 * (6 * 8 + 2 * 32 * 4)


def timed(shape: Experiment, kind: str = "v5p") -> tuple[StepTime, Flops]:
    kinds = kinds_of_layers(shape.model, 512, shape.train.seq_len)
    flops = sum((kind.flops for kind in kinds), Flops(0.0, 0.0, 0.0))
    memory = estimate_memory(shape, 512, "tpu")
    return predict(shape, memory, flops, 512, DEVICES[kind]), flops


def test_arithmetic_by_hand():
    step, flops = timed(experiment())
    tokens, peak = 8 * 1024, 459e12
    assert step.matmul == pytest.approx(3 * tokens * flops.matmul / (peak * ASSUMED["matmul"]))
    attention = 3.5 * tokens * flops.attention
    assert step.attention == pytest.approx(attention / (peak * ASSUMED["attention"]))
    assert step.links == {}
    assert step.seconds == max(step.matmul + step.attention, step.main_memory)
    assert step.mfu == pytest.approx(3 * flops.total * tokens / (step.seconds * peak))


def test_recomputing_costs_a_forward_more():
    plain, _ = timed(experiment())
    again, _ = timed(experiment(remat="full"))
    assert again.matmul == pytest.approx(plain.matmul * 4 / 3)
    assert again.attention == pytest.approx(plain.attention * 4.5 / 3.5)


def test_the_last_device_of_a_contiguous_ring_waits_for_nobody():
    """Of 4 chunks the last sees 3.5 of them, on average 2: zigzag takes 4/7 of its time."""
    mesh = MeshConfig(context=4)
    zigzag, _ = timed(experiment(mesh=mesh))
    contiguous, _ = timed(experiment(mesh=dataclasses.replace(mesh, context_layout="contiguous")))
    assert contiguous.attention == pytest.approx(zigzag.attention * 3.5 / 2)


def test_rings_on_large_slices_of_v5e_cannot_hide():
    many = MeshConfig(context=32)
    v5e, _ = timed(experiment(mesh=many), "v5e")
    v5p, _ = timed(experiment(mesh=many), "v5p")
    few, _ = timed(experiment(mesh=MeshConfig(context=16)), "v5e")
    assert v5e.exposed == v5e.links["keys and values over context"]
    assert v5p.exposed == few.exposed == 0.0


def test_float32_products_take_twice_as_long_on_gpus():
    narrow, _ = timed(experiment(), "h200")
    wide, _ = timed(experiment(dtypes=Dtypes()), "h200")
    assert wide.matmul == pytest.approx(2 * narrow.matmul)
