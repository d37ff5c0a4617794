"""The real train step, compiled for a machine that need not be here, and what its compiler says."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import time
from collections.abc import Sequence
from typing import Any

from memtrain.config import Experiment
from memtrain.errors import BadInput
from memtrain.plan.overlap import Overlap, permute_overlap
from memtrain.plan.target import Target


_PACKAGES = {
    "tpu": ("memtrain[tpu]", ("libtpu",)),
    "gpu": ("memtrain[cuda]", ("jax_cuda13_plugin", "nvidia")),
}
_ENVIRONMENT = {
    # libtpu asks the network and the host about TPUs unless it is told; nothing runs on one.
    "tpu": {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nobody holds a chip, so nobody keeps others from it
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    },
    "gpu": {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"},
}
# What the driver reports of an H200 and an H100, as far as XLA asks for it.
_GPU = """gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one device's program. Bytes."""

    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    """Outputs that take the place of donated arguments."""
    peak: int | None
    """The most that is live at once, where the compiler tells."""
    allocated: int | None
    """All that is set aside in main memory, where the compiler tells: what it refuses by."""
    host: int
    """In the host's memory: arguments, temporaries, new outputs. None of it is counted above."""
    flops: float | None
    """As the compiler counts: a loop's body once, kernels by their own estimate."""
    seconds: float
    overlap: Overlap

    @property
    def total(self) -> int:
        """What a device must have: as the compiler says it, else arguments, temporaries and the
        outputs that are new.

        On TPU the second is more than the program takes (by a third for the flagship): temporaries
        count there what is also laid in the place of outputs.
        """
        if self.allocated:
            return self.allocated
        return self.arguments + self.temporaries + self.outputs - self.aliased


def check_compiler(target: Target) -> None:
    """Raises BadInput that names the package to install where the target's compiler is missing."""
    extra, modules = _PACKAGES.get(target.device.platform, ("", ()))
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(
            f"--target {target.text}: the compiler is missing ({', '.join(missing)}): "
            f"install it with pip install '{extra}', or give --no-compile"
        )


def prepare_compiler(target: Target) -> None:
    """Sets what the target's compiler reads from the environment. Call it before JAX starts."""
    for name, value in _ENVIRONMENT.get(target.device.platform, {}).items():
        os.environ.setdefault(name, value)


def compile_train_step(experiment: Experiment, target: Target, vocab_size: int) -> Compiled:
    """Lowers and compiles the train step of this experiment for the target's devices.

    The mesh's devices need not exist. Raises BadInput where the compiler is missing, where the
    mesh does not fit, and where the program takes more memory than a device has.
    """
    import jax

    from memtrain.parallel.mesh import mesh_of
    from memtrain.train.state import Plan
    from memtrain.train.step import make_train_step
    from memtrain_kernels import compiling_for

    check_compiler(target)
    if target.device.platform == "gpu" and experiment.mesh.table_memory == "host":
        raise BadInput(
            "mesh.table_memory=host: GPUs that are not here have no host memory to compile for; "
            "give --no-compile"
        )
    experiment = _as_on_target(experiment, target)
    mesh = mesh_of(experiment.mesh, _devices(target))
    with contextlib.ExitStack() as stack:
        if target.device.platform != "cpu":
            stack.enter_context(compiling_for(target.device.platform, target.device.device_kind))
        plan = Plan.of(experiment, vocab_size, mesh)
        step: Any = make_train_step(plan)
        arguments = plan.abstract(), abstract_batch(experiment)
        if target.device.platform == "gpu":
            # Pallas asks the mesh of the context which GPU it lowers for.
            stack.enter_context(jax.sharding.use_abstract_mesh(mesh.abstract_mesh))
        began = time.perf_counter()
        try:
            traced = step.trace(*arguments)
        except ValueError as error:
            if "cannot serve this call" not in str(error):
                raise
            raise BadInput(
                f"--target {target.text}: {error}; name it in the layer (backend=) to plan with it"
            ) from error
        platform = {"gpu": "cuda"}.get(target.device.platform, target.device.platform)
        try:
            compiled = traced.lower(lowering_platforms=(platform,)).compile()
        except jax.errors.JaxRuntimeError as error:
            raise _too_large(error, target) or error from error
    return _figures(compiled, time.perf_counter() - began)


def abstract_batch(experiment: Experiment) -> Any:
    """The batch's shapes; the train step itself says how it is sharded."""
    import jax

    from memtrain.data.batch import Batch, empty_row

    shape = (experiment.train.batch_size, experiment.train.seq_len)
    leaves: list[Any] = [jax.ShapeDtypeStruct(shape, leaf.dtype) for leaf in empty_row(1)]
    return Batch(*leaves)


def _as_on_target(experiment: Experiment, target: Target) -> Experiment:
    """The choices that the model makes by the device that is here, made for the target's.

    Repeats are a loop there, and attention takes the device's own kernels: a self-check on the
    device decides that there, and none can run here.
    """
    from memtrain.model.language_model import full_pattern

    model, platform = experiment.model, target.device.platform
    if platform == "cpu":
        return experiment
    # Hopper's own kernel is of narrow numbers: in float32 a run there takes XLA's.
    on_gpu = "hopper" if model.dtypes.compute == "bfloat16" else "xla"
    backend = {"tpu": "tpu", "gpu": on_gpu}[platform]

    def chosen(layer: Any) -> Any:
        if dataclasses.is_dataclass(layer) and getattr(layer, "backend", "") is None:
            return dataclasses.replace(layer, backend=backend)  # type: ignore[type-var]
        return layer

    pattern = tuple(
        dataclasses.replace(block, mixer=chosen(block.mixer), ffn=chosen(block.ffn))
        for block in full_pattern(model)
    )
    unroll = 1 if model.scan_unroll is None else model.scan_unroll
    model = dataclasses.replace(model, pattern=pattern, scan_unroll=unroll)
    return dataclasses.replace(experiment, model=model)


def _devices(target: Target) -> Sequence[Any]:
    import jax
    from jax.experimental import topologies

    if target.device.platform == "cpu":
        return jax.devices("cpu")[: target.num_devices]
    if target.device.platform == "tpu":
        found = topologies.get_topology_desc(target.text, platform="tpu")
    else:
        device = target.device
        config = _GPU.format(
            bandwidth=int(device.memory_bytes_per_s),
            cache=62914560 if device.kind == "h200" else 52428800,
            memory=int(device.memory_bytes),
            name=device.device_kind,
        )
        found = topologies.get_topology_desc(
            platform="cuda", topology=f"1x1x{target.num_devices}", target_config=config
        )
    return list(found.devices)


def _too_large(error: Exception, target: Target) -> BadInput | None:
    """The compiler's own refusal, in a line."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        return None
    line = next((line for line in text.splitlines() if "xceeded" in line or "Used" in line), text)
    return BadInput(f"the compiler for {target.text} refuses: {' '.join(line.split())[:300]}")


def _figures(compiled: Any, seconds: float) -> Compiled:
    memory = compiled.memory_analysis()
    in_use = lambda at: getattr(memory, f"host_{at}_size_in_bytes", 0)  # noqa: E731
    host = in_use("argument") + in_use("temp") + in_use("output") - in_use("alias")
    cost = compiled.cost_analysis() or {}
    flops = cost.get("flops")
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        # Both count what is in the host's memory too, the second more than once.
        peak=None if host else getattr(memory, "peak_memory_in_bytes", None),
        allocated=None if host else getattr(memory, "total_allocation_bytes", None),
        host=host,
        flops=None if flops is None or flops < 0 else float(flops),
        seconds=seconds,
        overlap=permute_overlap(compiled.as_text() or ""),
    )
