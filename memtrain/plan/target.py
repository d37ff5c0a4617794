"""What `--target` names: a kind of device, how many of them, and how they are wired. No JAX."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from memtrain.errors import BadInput
from memtrain.parallel.config import MeshConfig
from memtrain.plan.devices import DEVICES, Device, simulated_cpu


KNOWN = "v5e:AxB, v5p:AxBxC, v6e:AxB, h100xN, h200xN, cpuxN"


@dataclass(frozen=True)
class Target:
    """A machine that is planned for."""

    text: str
    device: Device
    topology: tuple[int, ...]
    """Chips along each axis of a TPU slice; the number of devices otherwise."""

    @property
    def num_devices(self) -> int:
        return math.prod(self.topology)


def parse_target(text: str) -> Target:
    """ "v5p:4x4x4", "h200x8", "cpux8". Raises BadInput that lists the known ones."""
    found = re.fullmatch(r"(h100|h200|cpu)x(\d+)", text) or re.fullmatch(
        r"(v5e|v5p|v6e):(\d+(?:x\d+)*)", text
    )
    if found is None:
        raise BadInput(f"--target {text!r} is not known: there are {KNOWN}")
    kind, sizes = found[1], tuple(int(size) for size in found[2].split("x"))
    if min(sizes) < 1:
        raise BadInput(f"--target {text!r}: every number is at least 1")
    if kind == "cpu":
        return Target(text, simulated_cpu(sizes[0]), sizes)
    device = DEVICES[kind]
    if device.topology_dims and len(sizes) != device.topology_dims:
        example = "x".join(["4"] * device.topology_dims)
        raise BadInput(
            f"--target {text!r}: a {device.name} slice has {device.topology_dims} axes, "
            f"as in {kind}:{example}"
        )
    return Target(text, device, sizes)


def check_mesh(mesh: MeshConfig, target: Target, rows: int | None = None) -> None:
    """Raises BadInput where the mesh has another number of devices than the target.

    rows: of the batch that are read at once; what is proposed divides them.
    """
    if mesh.num_devices == target.num_devices:
        return
    product = " x ".join(f"{axis} {size}" for axis, size in mesh.sizes.items())
    hint = next((f"; {setting} makes it" for setting in _that_make_it(mesh, target, rows)), "")
    raise BadInput(
        f"the mesh {product} takes {mesh.num_devices} devices and --target {target.text} has "
        f"{target.num_devices}{hint}"
    )


def _that_make_it(mesh: MeshConfig, target: Target, rows: int | None) -> Iterator[str]:
    """One axis changed: more rows at once first, then longer ones over more devices."""
    for axis in ("fsdp", "data", "context"):
        size, left = divmod(target.num_devices, mesh.num_devices // mesh.sizes[axis])
        parts = mesh.data * mesh.fsdp // mesh.sizes[axis] * size if axis != "context" else 1
        if not left and (rows is None or rows % parts == 0):
            yield f"mesh.{axis}={size}"
