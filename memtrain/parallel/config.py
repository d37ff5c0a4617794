"""The mesh of a run. Imports no JAX."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; their product is the number of devices used."""

    data: int = 1
    """Replicas: each holds all parameters and reads its own rows."""
    fsdp: int = 1
    """Shards: each holds a part of every parameter and reads its own rows."""
    context: int = 1
    """Parts of the sequence. Only 1 is served today."""
    tensor: int = 1
    """Parts of heads and hidden units. Only 1 is served today."""
