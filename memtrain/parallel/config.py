"""The mesh of a run. Imports no JAX."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


AXES = ("data", "fsdp", "context", "tensor")

ContextStrategy = Literal["auto", "ring", "ulysses", "usp", "all_gather"]
ContextLayout = Literal["auto", "contiguous", "zigzag", "striped"]


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; their product is the number of devices used."""

    data: int = 1
    """Replicas: each holds all parameters and reads its own rows."""
    fsdp: int = 1
    """Shards: each holds a part of every parameter and reads its own rows."""
    context: int = 1
    """Parts of the sequence: each device reads its own tokens of every row. Parameters are sharded
    over these devices too."""
    tensor: int = 1
    """Parts of heads and hidden units."""
    context_strategy: ContextStrategy = "auto"
    """How attention reaches the tokens of other devices: keys and values travel round a "ring",
    heads are exchanged for tokens ("ulysses", DeepSpeed), both together ("usp"), or every device
    gathers all keys and values ("all_gather"). "auto" is the ring; "usp" where the machine cannot
    hide a ring's permutes (TPU v5e from 32 chips on) and a layer attends to the whole document."""
    context_layout: ContextLayout = "auto"
    """Which tokens a device holds: one stretch ("contiguous"), one early and one late stretch
    ("zigzag", which balances causal attention), or every n-th token ("striped"). "auto" is zigzag
    where a layer attends to the whole document, else contiguous."""
    context_ulysses: int | None = None
    """With "usp": devices of the context axis that exchange heads among each other; the ring runs
    over the groups. The most that the heads allow, unless given."""

    table_memory: Literal["device", "host"] = "device"
    """Where memory tables that are updated lazily live, and their moments: in the devices' memory,
    or in that of the host of each device, which then reads and updates its rows there, so that
    only what was read and its gradients travel."""

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis, in mesh order."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def num_devices(self) -> int:
        return math.prod(self.sizes.values())
