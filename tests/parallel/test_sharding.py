"""From logical axes to mesh axes, and the peak that the MFU of a mesh is counted from."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from memtrain.memory.protocol import LeafSpec
from memtrain.parallel.mesh import AXES
from memtrain.parallel.peak import peak_flops
from memtrain.parallel.sharding import (
    RULES,
    batch_sharding,
    partition_spec,
    replicated_dims,
    sharding_for,
    state_shardings,
)


def mesh_of_sizes(data: int = 1, fsdp: int = 1, context: int = 1, tensor: int = 1) -> Mesh:
    sizes = (data, fsdp, context, tensor)
    return Mesh(np.asarray(jax.devices()[: math.prod(sizes)]).reshape(sizes), AXES)


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (("batch", None), P(("data", "fsdp"), None)),
        (("vocab", "embed"), P("tensor", "fsdp")),
        (("embed", "heads"), P("fsdp", "tensor")),
        (("heads", "embed"), P("tensor", "fsdp")),
        (("layers", "embed", "mlp"), P(None, "fsdp", "tensor")),
        (("slots", "value_dim"), P("fsdp", "tensor")),
        (("kv_heads", "head_dim"), P("tensor", None)),
        ((None, "key_dim"), P(None, None)),
        ((), P()),
    ],
)
def test_the_rules(axes, expected):
    assert partition_spec(axes, mesh_of_sizes(data=2, fsdp=2, tensor=2)) == expected


def test_time_and_caches_follow_the_context_axis():
    mesh = mesh_of_sizes(data=2, context=2, tensor=2)
    assert partition_spec(("batch", "time"), mesh) == P("data", "context")
    cache = ("batch", "cache", "kv_heads", "head_dim")
    assert partition_spec(cache, mesh) == P("data", "context", "tensor", None)


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (("embed", "slots"), P("fsdp", None)),
        (("slots", "embed"), P("fsdp", None)),
        (("heads", "mlp", "vocab"), P("tensor", None, None)),
        # The batch has taken fsdp, so that the width of its activations has nothing to lie along.
        (("batch", "time", "embed"), P(("data", "fsdp"), None, None)),
        (("embed", "batch"), P("fsdp", "data")),
    ],
)
def test_a_mesh_axis_serves_the_first_dimension_that_asks(axes, expected):
    assert partition_spec(axes, mesh_of_sizes(data=2, fsdp=2, tensor=2)) == expected


def test_no_mesh_axis_is_ever_used_twice():
    mesh = mesh_of_sizes(data=2, fsdp=2, tensor=2)
    for axes in itertools.product(RULES, repeat=3):
        used = [n for entry in partition_spec(axes, mesh) for n in _names(entry)]
        assert len(used) == len(set(used)), axes


def _names(entry) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"data": 8}, P("data", None)),
        ({"fsdp": 8}, P("fsdp", None)),
        ({"data": 2, "fsdp": 4}, P(("data", "fsdp"), None)),
        ({"tensor": 8}, P(None, None)),
        ({}, P(None, None)),
    ],
)
def test_the_batch_lies_over_data_and_fsdp(sizes, expected):
    assert partition_spec(("batch", None), mesh_of_sizes(**sizes)) == expected


@pytest.mark.parametrize(
    ("axes", "shape", "expected", "whole"),
    [
        (("embed", "mlp"), (16, 6), P("fsdp", "tensor"), []),
        (("embed", "mlp"), (18, 6), P(None, "tensor"), [0]),
        (("embed", "mlp"), (16, 7), P("fsdp", None), [1]),
        (("embed", "mlp"), (3, 7), P(None, None), [0, 1]),
        (("layers", "embed"), (3, 8), P(None, "fsdp"), []),
        # A dimension that cannot be cut leaves the mesh axis to the next one that asks.
        (("slots", "embed"), (6, 8), P(None, "fsdp"), [0]),
    ],
)
def test_what_does_not_divide_is_replicated_and_named(axes, shape, expected, whole):
    mesh = mesh_of_sizes(fsdp=4, tensor=2)
    assert partition_spec(axes, mesh, shape) == expected
    assert replicated_dims(axes, mesh, shape) == whole


def test_a_batch_is_cut_over_the_axes_that_divide_it():
    """As the kernels' own partition does: axes in order, as long as all together divide."""
    mesh = mesh_of_sizes(data=2, fsdp=4)
    assert partition_spec(("batch", None), mesh, (8, 3)) == P(("data", "fsdp"), None)
    assert partition_spec(("batch", None), mesh, (4, 3)) == P("data", None)
    assert partition_spec(("batch", None), mesh, (3, 3)) == P(None, None)
    assert replicated_dims(("batch", None), mesh, (4, 3)) == [0]


def test_an_axis_that_no_rule_names_is_an_error():
    with pytest.raises(KeyError, match="embedd"):
        partition_spec(("embedd",), mesh_of_sizes(fsdp=2))


def test_arrays_come_to_lie_where_the_spec_says():
    mesh = mesh_of_sizes(data=2, fsdp=2, tensor=2)
    sharding = sharding_for(("embed", "mlp"), mesh, (4, 6))
    assert sharding == NamedSharding(mesh, P("fsdp", "tensor"))
    array = np.arange(24).reshape(4, 6)
    placed = jax.device_put(array, sharding)
    held = {shard.device: np.asarray(shard.data) for shard in placed.addressable_shards}
    for data, fsdp, tensor in itertools.product(range(2), repeat=3):
        device = mesh.devices[data, fsdp, 0, tensor]
        rows, columns = slice(2 * fsdp, 2 * fsdp + 2), slice(3 * tensor, 3 * tensor + 3)
        np.testing.assert_array_equal(held[device], array[rows, columns])


def test_rows_of_a_batch_come_to_lie_in_order():
    mesh = mesh_of_sizes(data=2, fsdp=4)
    tokens = np.arange(16).reshape(8, 2)
    placed = jax.device_put(tokens, batch_sharding(mesh))
    held = {shard.device: np.asarray(shard.data) for shard in placed.addressable_shards}
    for row, device in enumerate(mesh.devices.reshape(-1)):
        np.testing.assert_array_equal(held[device], tokens[row : row + 1])


def test_a_state_lies_with_its_rows_and_heads():
    mesh = mesh_of_sizes(data=2, fsdp=2, tensor=2)
    content = ("batch", "cache", "kv_heads", "head_dim")
    spec = {
        "key": LeafSpec((8, 5, 2, 6), np.float32, content),
        "odd": LeafSpec((8, 5, 3, 6), np.float32, content),  # 3 heads do not divide
        "length": LeafSpec((8,), np.int32, ("batch",)),
    }
    found = {name: s.spec for name, s in state_shardings(spec, mesh).items()}
    assert found == {
        "key": P(("data", "fsdp"), None, "tensor", None),
        "odd": P(("data", "fsdp"), None, None, None),
        "length": P(("data", "fsdp")),
    }


@dataclasses.dataclass
class Accelerator:
    device_kind: str
    platform: str = "gpu"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch):
    """Makes the machine's devices of this kind."""

    def become(kind: str) -> None:
        monkeypatch.setattr(jax, "devices", lambda *_: [Accelerator(kind)])

    return become


# Dense bf16 of the vendors' data sheets, in FLOP/s; device kinds as JAX reports them.
@pytest.mark.parametrize(
    ("kind", "expected", "named"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, "NVIDIA A100"),
        ("NVIDIA H100 80GB HBM3", 989e12, "NVIDIA H100"),
        ("NVIDIA H200", 989e12, "NVIDIA H200"),
        ("NVIDIA B200", 2.25e15, "NVIDIA B200"),
        ("TPU v4", 275e12, "TPU v4"),
        # Their names begin alike: a v5e is no v5p.
        ("TPU v5 lite", 197e12, "TPU v5 lite"),
        ("TPU v5e", 197e12, "TPU v5e"),
        ("TPU v5", 459e12, "TPU v5"),
        ("TPU v5p", 459e12, "TPU v5p"),
        ("TPU v6 lite", 918e12, "TPU v6 lite"),
    ],
)
def test_peak_of_known_accelerators(device, kind, expected, named):
    device(kind)
    assert peak_flops(1, "bfloat16") == (expected, f"{named} data sheet, bf16")
    assert peak_flops(8, "bfloat16")[0] == 8 * expected


def test_an_unknown_accelerator_has_no_peak_and_says_so(device):
    device("Riva 128")
    peak, source = peak_flops(4, "bfloat16")
    assert peak is None
    assert "Riva 128" in source


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_of_the_cpu_is_measured(dtype):
    peak, source = peak_flops(1, dtype)
    # From an old phone to a large server: far outside it, the count or the clock is wrong.
    assert peak is not None and 1e8 < peak < 1e15
    assert "measured" in source and dtype in source and "CPU" in source


def test_simulated_devices_share_one_cpu(monkeypatch: pytest.MonkeyPatch):
    """On a clock that advances by a fixed time per look, so that the figures can be compared."""
    now = itertools.count()
    tick = 0.5
    monkeypatch.setattr("time.perf_counter", lambda: tick * next(now))
    one = peak_flops(1, "float32")[0]
    assert one is not None and peak_flops(8, "float32")[0] == one
    tick = 0.125  # every product takes a fourth of the time
    assert peak_flops(1, "float32")[0] == 4 * one
