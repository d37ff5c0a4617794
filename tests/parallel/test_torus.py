"""Meshes on a TPU's torus: made-up chips with the coordinates that real slices have."""

import dataclasses
import itertools
import logging
import math
from typing import Any

import numpy as np
import pytest

from memtrain.errors import BadInput
from memtrain.parallel import mesh as meshes
from memtrain.parallel.config import MeshConfig
from memtrain.parallel.mesh import ordered
from memtrain.parallel.torus import cycle_of_box


@dataclasses.dataclass(frozen=True)
class Chip:
    """What `mesh_utils` and the library ask of a device."""

    id: int
    coords: tuple[int, int, int]
    process_index: int
    slice_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0


def slice_of(
    x: int, y: int, z: int, *, host: tuple[int, int, int] = (2, 2, 1), number: int = 0, **more
) -> list[Chip]:
    """In JAX's order: host by host, and in each as in the slice, x fastest."""
    hosts = [n // h for n, h in zip((x, y, z), host, strict=True)]
    chips = []
    for hz, hy, hx in itertools.product(*map(range, reversed(hosts))):
        process = len(chips) // math.prod(host) + number * math.prod(hosts)
        for cz, cy, cx in itertools.product(*map(range, reversed(host))):
            place = (hx * host[0] + cx, hy * host[1] + cy, hz * host[2] + cz)
            chips.append(Chip(len(chips), place, process, number, **more))
    return chips


SLICES = {
    "v5p:2x2x1": slice_of(2, 2, 1),
    "v5p:4x4x4": slice_of(4, 4, 4),
    "v5p:4x4x8": slice_of(4, 4, 8),
    "v5e:4x4": slice_of(4, 4, 1, device_kind="TPU v5 lite"),
    "v5e:4x8": slice_of(4, 8, 1, host=(4, 2, 1), device_kind="TPU v5 lite"),
    "v6e:16x16": slice_of(16, 16, 1, device_kind="TPU v6 lite"),
}


def steps(line: np.ndarray) -> list[int]:
    """Links between each chip of a ring and the next, the last's to the first counted too, on a
    grid that does not wrap round."""
    coords = np.array([chip.coords for chip in line])
    return np.abs(coords - np.roll(coords, -1, axis=0)).sum(-1).tolist()


@pytest.mark.parametrize("name", SLICES)
def test_every_link_of_a_ring_over_a_slice_is_one_step(name: str):
    chips = SLICES[name]
    mesh = ordered(MeshConfig(context=len(chips)), chips)
    assert mesh.shape == (1, 1, len(chips), 1)
    assert set(mesh.flat) == set(chips)
    assert steps(mesh[0, 0, :, 0]) == [1] * len(chips)
    # In JAX's order it is not so: there is something to do here.
    assert max(steps(np.array(chips))) > 1


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("v5p:4x4x4", {"fsdp": 4, "context": 16}),
        ("v5p:4x4x4", {"data": 2, "context": 32}),
        ("v5p:4x4x4", {"context": 16, "tensor": 4}),
        ("v5p:4x4x8", {"data": 4, "context": 32}),
        ("v5e:4x8", {"fsdp": 2, "context": 16}),
        ("v6e:16x16", {"data": 2, "fsdp": 4, "context": 32}),
    ],
)
def test_beside_other_axes_too(name: str, sizes: dict[str, Any]):
    chips = SLICES[name]
    mesh = ordered(MeshConfig(**sizes), chips)
    assert set(mesh.flat) == set(chips)
    size = np.array([chip.coords for chip in chips]).max(0) + 1
    for line in np.moveaxis(mesh, 2, -1).reshape(-1, sizes["context"]):
        coords = np.array([chip.coords for chip in line])
        apart = np.abs(coords - np.roll(coords, -1, axis=0))
        # Here a ring may go round the torus.
        assert np.minimum(apart, size - apart).sum(-1).tolist() == [1] * len(line)


@pytest.mark.parametrize("dims", [(2, 2), (2, 3), (3, 2), (1, 4, 5), (4, 4, 4), (3, 5, 2), (3, 4)])
def test_a_cycle_visits_every_cell_once_and_steps_to_a_neighbour(dims: tuple[int, ...]):
    cycle = cycle_of_box(dims)
    assert cycle is not None
    assert sorted(cycle) == list(itertools.product(*map(range, dims)))
    for here, there in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
        assert sum(abs(a - b) for a, b in zip(here, there, strict=True)) == 1


@pytest.mark.parametrize("dims", [(4,), (1, 8, 1), (3, 3), (3, 5, 7)])
def test_lines_and_odd_boxes_have_none(dims: tuple[int, ...]):
    assert cycle_of_box(dims) is None


def test_several_slices_lie_along_the_first_axis_that_they_divide():
    chips = [*slice_of(4, 4, 4), *slice_of(4, 4, 4, number=1)]
    by_data = ordered(MeshConfig(data=2, context=64), chips)
    for part in (0, 1):
        assert {chip.slice_index for chip in by_data[part].flat} == {part}
        assert steps(by_data[part, 0, :, 0]) == [1] * 64
    # A row over both slices: each half of the ring is in one, and goes round there by links.
    whole = ordered(MeshConfig(context=128), chips)[0, 0, :, 0]
    for part in (0, 1):
        half = whole[64 * part : 64 * part + 64]
        assert {chip.slice_index for chip in half} == {part}
        assert steps(half)[:-1] == [1] * 63


def test_slices_never_lie_along_tensor(caplog):
    chips = [*slice_of(2, 2, 1), *slice_of(2, 2, 1, number=1)]
    with caplog.at_level(logging.WARNING):
        mesh = ordered(MeshConfig(tensor=8), chips)
    assert list(mesh.flat) == chips
    assert "keep JAX's order" in caplog.text


def test_chips_that_make_no_cuboid_keep_their_order_and_it_is_said(caplog):
    chips = slice_of(4, 4, 1)[:6]
    with caplog.at_level(logging.WARNING):
        mesh = ordered(MeshConfig(context=6), chips)
    assert list(mesh.flat) == chips
    assert "cannot lie on these 6 TPU chips" in caplog.text


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_others_keep_jaxs_order(platform: str):
    devices = [dataclasses.replace(chip, platform=platform) for chip in slice_of(2, 2, 2)]
    assert list(ordered(MeshConfig(data=2, context=4), devices).flat) == devices


@dataclasses.dataclass(frozen=True)
class FakeMesh:
    devices: np.ndarray


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 16},
        {"fsdp": 16},
        {"data": 4, "fsdp": 4},
        {"data": 4, "context": 4},
        {"data": 8, "tensor": 2},
    ],
)
def test_every_process_reads_a_block_of_rows(sizes: dict[str, Any], monkeypatch):
    """Hosts of 2 x 2 chips: in the order of the torus, a host's chips are not one after another."""
    chips = SLICES["v5e:4x4"]
    mesh = FakeMesh(ordered(MeshConfig(**sizes), chips))
    covered: dict[int, set[tuple[int, int]]] = {}
    for process in range(4):
        monkeypatch.setattr(meshes.jax, "process_index", lambda process=process: process)
        index, count = meshes.local_rows(mesh)  # type: ignore[arg-type]
        rows = mesh.devices.reshape(sizes.get("data", 1) * sizes.get("fsdp", 1), -1)
        held = [i for i, row in enumerate(rows) if process in {c.process_index for c in row}]
        each = len(rows) // count
        assert held == list(range(index * each, (index + 1) * each))
        covered.setdefault(count, set()).add((index, count))
    assert {index for found in covered.values() for index, _ in found} == set(range(max(covered)))


def test_rows_that_no_order_brings_together_are_refused_by_name(monkeypatch):
    # Three rows of two chips each over hosts of four: the middle row is on both.
    chips = [Chip(i, (i, 0, 0), i // 4, platform="cpu") for i in range(6)]
    monkeypatch.setattr(meshes.jax, "process_index", lambda: 0)
    mesh = FakeMesh(ordered(MeshConfig(data=3, context=2), chips))
    with pytest.raises(BadInput, match="rows \\[0, 1\\] of 3 row shards"):
        meshes.local_rows(mesh)  # type: ignore[arg-type]
