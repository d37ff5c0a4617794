"""How long a step takes at best: arithmetic, memory and links, each against what the device has.

Assumed shares of the data sheet's rates are stated with every estimate; they are round numbers of
what well-made programs reach, not measurements of this one.
"""

from __future__ import annotations

import dataclasses

from memtrain.config import Experiment
from memtrain.model.flops import Flops
from memtrain.parallel.links import permutes_wait
from memtrain.plan.devices import Device
from memtrain.plan.layout import attention_layers, tokens_of
from memtrain.plan.memory import MemoryEstimate
from memtrain.plan.traffic import CONTEXT, Transfer, memory_traffic, transfers


ASSUMED = {"matmul": 0.7, "attention": 0.5, "memory": 0.3, "main memory": 0.8, "links": 0.8}
"""Shares of the peak."""


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step. `bound` is the part that the step waits for most."""

    matmul: float
    attention: float
    memory: float
    main_memory: float
    links: dict[str, float]
    exposed: float
    """Of the links' time, what no computation hides, whatever the rest is."""
    seconds: float
    bound: str
    flops: float
    """Of one device, recomputation counted."""
    mfu: float
    """Of the model's FLOPs (three forward passes, nothing counted twice) against the peak."""


def predict(
    experiment: Experiment, memory: MemoryEstimate, flops: Flops, vocab_size: int, device: Device
) -> StepTime:
    """flops: of one token, forward."""
    mesh, train, config = experiment.mesh, experiment.train, experiment.model
    tokens = train.batch_size * train.seq_len / mesh.num_devices
    peak = device.flops_per_s
    if config.dtypes.matmul == "float32":
        peak *= device.float32_fraction
    again = 0 if config.remat == "none" else 1
    matmul = flops.matmul * (3 + again) * tokens
    # The backward of attention makes its scores anew: five products, where the forward has two.
    attention = flops.attention * (3.5 + again) * tokens * _imbalance(experiment)
    lookup = flops.memory * (3 + again) * tokens
    seconds = {
        "matmul": matmul / (peak * ASSUMED["matmul"]),
        "attention": attention / (peak * ASSUMED["attention"]),
        "memory": lookup / (peak * ASSUMED["memory"]),
    }
    main_memory = memory_traffic(experiment, memory) / (
        device.memory_bytes_per_s * ASSUMED["main memory"]
    )
    sent = transfers(experiment, memory, vocab_size)
    links = {t.name: t.bytes / (device.link_bytes_per_s * ASSUMED["links"]) for t in sent}
    exposed = sum(links[t.name] for t in sent if not _overlaps(t, experiment, device))
    hidden = sum(links.values()) - exposed
    compute = sum(seconds.values())
    busy = max(compute, main_memory, hidden)
    names = {compute: "arithmetic", main_memory: "main memory", hidden: "links"}
    bound = "links" if exposed > busy else names[busy]
    total = busy + exposed
    return StepTime(
        **seconds,
        main_memory=main_memory,
        links=links,
        exposed=exposed,
        seconds=total,
        bound=bound,
        flops=matmul + attention + lookup,
        mfu=flops.training * tokens / (total * device.flops_per_s),
    )


def _overlaps(transfer: Transfer, experiment: Experiment, device: Device) -> bool:
    waits = permutes_wait(device.device_kind, experiment.mesh.num_devices)
    return transfer.overlaps and not (transfer.name == CONTEXT and waits)


def _imbalance(experiment: Experiment) -> float:
    """The slowest device's attention against the mean: in a contiguous ring, the last has most.

    The mean of n chunks sees n/2 chunks, the last n - 1/2. With windows all are alike.
    """
    n = experiment.mesh.context
    whole = any(layer.window is None for _, layer in attention_layers(experiment.model))
    tokens = tokens_of(experiment)
    if n == 1 or not whole or tokens.layout.kind != "contiguous" or tokens.strategy == "ulysses":
        return 1.0
    return (n - 0.5) / (n / 2)
