"""Where a plan ends: the longest context that fits a device, and the smallest change that helps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from memtrain.config import Experiment
from memtrain.errors import BadInput
from memtrain.overrides import override
from memtrain.plan.devices import Device
from memtrain.plan.layout import tokens_of
from memtrain.plan.memory import estimate_memory


Total = Callable[[Experiment], int]


def longest_context(experiment: Experiment, vocab_size: int, device: Device) -> int:
    """The greatest `train.seq_len` whose estimate fits, in steps that the layout can split.

    Rows of the batch stay what they are. 0 where not even the shortest fits.
    """

    def fits(units: int) -> bool:
        longer = with_seq_len(experiment, units * step)
        return estimate_memory(longer, vocab_size, device.platform).total <= device.memory_bytes

    step = tokens_of(experiment).layout.multiple
    # Lengths that nobody would ask for (37 tokens more) are no news: multiples of 128 a device.
    step *= max(1, 128 * experiment.mesh.context // step) * experiment.train.tbptt_segments
    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high * step < 2**34:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * step


def with_seq_len(experiment: Experiment, seq_len: int) -> Experiment:
    return dataclasses.replace(
        experiment, train=dataclasses.replace(experiment.train, seq_len=seq_len)
    )


def smallest_change(experiment: Experiment, vocab_size: int, device: Device) -> str | None:
    """Settings, as `--set` takes them, with which the plan fits: the first in this order.

    Recompute more; shard more over the same devices; accumulate; all of it together; then a shorter
    sequence. None if nothing does.
    """
    for settings in _candidates(experiment):
        try:
            changed = override(experiment, settings)
            tokens_of(changed)
            total = estimate_memory(changed, vocab_size, device.platform).total
        except BadInput:
            continue
        if total <= device.memory_bytes:
            return " ".join(settings)
    shortest = longest_context(experiment, vocab_size, device)
    if shortest:
        return f"train.seq_len={shortest}"
    return None


def _candidates(experiment: Experiment) -> Iterator[list[str]]:
    remat = [["model.remat=full"]] if experiment.model.remat != "full" else []
    if experiment.model.remat == "none":
        remat.insert(0, ["model.remat=dots"])
    mesh = list(_meshes(experiment))
    train = experiment.train
    parts = [
        [f"train.accumulation_steps={train.accumulation_steps * times}"]
        for times in (2, 4, 8)
        if train.batch_size
        % (train.accumulation_steps * times * experiment.mesh.data * experiment.mesh.fsdp)
        == 0
    ]
    yield from remat
    yield from mesh
    yield from parts
    full = remat[-1:] or [[]]
    for first in full:
        yield from (first + more for more in mesh if first)
        yield from (first + more for more in parts if first)
        yield from (first + one + two for one in mesh for two in parts)


def _meshes(experiment: Experiment) -> Iterator[list[str]]:
    """The same devices, with more of them along an axis that shards more than `data` does."""
    mesh = experiment.mesh
    for axis in ("fsdp", "context"):
        times = 2
        while mesh.data % times == 0:
            yield [f"mesh.data={mesh.data // times}", f"mesh.{axis}={getattr(mesh, axis) * times}"]
            times *= 2
    times = 2
    while mesh.fsdp % times == 0:
        yield [f"mesh.fsdp={mesh.fsdp // times}", f"mesh.context={mesh.context * times}"]
        times *= 2
