"""The device mesh, over one process or many."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from memtrain.errors import BadInput
from memtrain.parallel.config import AXES, MeshConfig


BATCH_AXES = ("data", "fsdp")


def initialize_distributed() -> None:
    """Joins the job's other processes, where the environment says that there are any.

    `JAX_COORDINATOR_ADDRESS` with `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` names them by hand;
    Slurm, Open MPI, Kubernetes and TPU pods are recognised by `jax.distributed` itself. Call it
    before anything touches a device.
    """
    if jax.distributed.is_initialized():
        return
    by_hand = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if by_hand:
        missing = [n for n in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID") if n not in os.environ]
        if missing:
            raise BadInput(
                f"JAX_COORDINATOR_ADDRESS is set but {' and '.join(missing)} is not: set all three"
            )
        if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            by_hand, int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
        )
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NODELIST" in os.environ:
        jax.distributed.initialize()


def mesh_of(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh `data x fsdp x context x tensor` over the first devices of the job.

    Raises BadInput where there are too few devices.
    """
    shape = tuple(config.sizes.values())
    if min(shape) < 1:
        raise BadInput(f"mesh {config.sizes}: every axis is at least 1")
    devices = jax.devices() if devices is None else devices
    wanted = config.num_devices
    if wanted > len(devices):
        raise BadInput(
            f"mesh.data x mesh.fsdp x mesh.context x mesh.tensor = {wanted} devices, but there are "
            f"{len(devices)} ({devices[0].platform})"
        )
    if jax.process_count() > 1 and wanted != len(devices):
        raise BadInput(
            f"the mesh uses {wanted} of {len(devices)} devices of {jax.process_count()} processes; "
            "a job of several processes uses all its devices"
        )
    return Mesh(np.asarray(devices[:wanted]).reshape(shape), AXES)


def local_rows(mesh: Mesh) -> tuple[int, int]:
    """Which block of a batch's rows this process reads, of how many: (index, count).

    Processes whose devices hold parts of the same rows (along context or tensor) read the same.
    """
    parts = mesh.devices.reshape(*mesh.devices.shape[:2], -1)
    rows = parts.reshape(-1, parts.shape[-1])
    process = jax.process_index()
    mine = [i for i, row in enumerate(rows) if any(d.process_index == process for d in row)]
    if mine != list(range(mine[0], mine[-1] + 1)) or len(rows) % len(mine) or mine[0] % len(mine):
        raise BadInput(
            f"the devices of process {process} hold rows {mine} of {len(rows)} row shards: a mesh "
            "whose data x fsdp parts fall on whole processes is wanted"
        )
    return mine[0] // len(mine), len(rows) // len(mine)
