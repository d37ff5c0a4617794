"""The device mesh, over one process or many."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from memtrain.errors import BadInput
from memtrain.parallel.config import AXES, MeshConfig
from memtrain.parallel.torus import arranged


logger = logging.getLogger(__name__)
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
    return Mesh(ordered(config, devices[:wanted]), AXES)


def ordered(config: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """The devices of a job [data, fsdp, context, tensor], as many as the mesh wants.

    On TPU by their places on the torus, so that neighbours along `context` are joined by a link;
    slices lie along `data` first. Elsewhere in JAX's order. Rows of the batch stay on whole
    processes where JAX's order has them there.
    """
    shape = tuple(config.sizes.values())
    plain = np.asarray(devices).reshape(shape)
    if devices[0].platform != "tpu":
        return plain
    mesh = arranged(shape, devices, ring=AXES.index("context"))
    if mesh is None:
        logger.warning(
            "the mesh %s cannot lie on these %d TPU chips as on a torus: they keep JAX's order, "
            "in which neighbours along context may be links apart",
            config.sizes,
            len(devices),
        )
        return plain
    if _scattered(mesh):
        # `local_rows` wants the rows of a process together.
        rows = mesh.reshape(math.prod(shape[:2]), -1)
        mesh = rows[np.argsort(_processes(rows).min(axis=1), kind="stable")].reshape(shape)
    if _scattered(mesh) and not _scattered(plain):
        logger.warning(
            "the mesh %s lies on the torus in such a way that a process's rows are not together: "
            "the chips keep JAX's order, in which neighbours along context may be links apart",
            config.sizes,
        )
        return plain
    return mesh


def local_rows(mesh: Mesh) -> tuple[int, int]:
    """Which block of a batch's rows this process reads, of how many: (index, count).

    Processes whose devices hold parts of the same rows (along context or tensor) read the same.
    """
    process = jax.process_index()
    mine, count = _rows_of(mesh.devices, process)
    if not _are_a_block(mine, count):
        raise BadInput(
            f"the devices of process {process} hold rows {mine} of {count} row shards: a mesh "
            "whose data x fsdp parts fall on whole processes is wanted"
        )
    return mine[0] // len(mine), count // len(mine)


def _rows_of(mesh: np.ndarray, process: int) -> tuple[list[int], int]:
    """The row shards that a process holds any part of, and how many there are."""
    holds = (_processes(mesh) == process).any(axis=(2, 3)).ravel()
    return np.flatnonzero(holds).tolist(), holds.size


def _are_a_block(mine: list[int], count: int) -> bool:
    together = mine == list(range(mine[0], mine[-1] + 1))
    return together and count % len(mine) == 0 and mine[0] % len(mine) == 0


def _scattered(mesh: np.ndarray) -> bool:
    """Whether `local_rows` would refuse on some process."""
    processes = np.unique(_processes(mesh))
    return not all(_are_a_block(*_rows_of(mesh, int(process))) for process in processes)


def _processes(devices: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda device: device.process_index, otypes=[int])(devices)
