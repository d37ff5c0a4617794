"""`memtrain plan`: puts the estimates together, and says where a plan does not fit."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

from memtrain.config import Experiment
from memtrain.errors import BAD_INPUT, BadInput
from memtrain.model.flops import Flops
from memtrain.plan.compile import check_compiler, compile_train_step
from memtrain.plan.fit import longest_context, smallest_change
from memtrain.plan.layers import Kind, kinds_of_layers
from memtrain.plan.layout import attention_layers, hops_of, on_device, tokens_of
from memtrain.plan.memory import MemoryEstimate, estimate_memory
from memtrain.plan.plot import draw
from memtrain.plan.roofline import ASSUMED, StepTime, predict
from memtrain.plan.sizes import Size
from memtrain.plan.sweep import Sweep
from memtrain.plan.target import Target, check_mesh


def plan(
    experiment: Experiment,
    *,
    target: Target | None = None,
    compiles: bool = False,
    sweep: Sweep | None = None,
    plot: Path | None = None,
) -> dict[str, Any]:
    """The whole plan as one object: see docs/plan.md for its parts. Nothing is allocated.

    `exit_code` is 2, with the reason in `error`, where the plan does not fit the target's memory.
    Raises BadInput for a mesh, a sequence or heads that cannot be split, and a missing compiler.
    """
    why = ""
    if sweep is None:
        _check(experiment, target)
        if target is not None:
            experiment, why = on_device(experiment, target.device.device_kind)
    else:
        # Each point is checked before the first is estimated.
        for point in sweep.points:
            _check(point, target)
    if compiles and target is not None:
        check_compiler(target)
    if sweep is not None:
        return _swept(experiment, sweep, target, compiles=compiles, plot=plot)
    vocab = vocab_size_of(experiment)
    estimate = _Estimate(experiment, target, vocab)
    result = estimate.as_dict()
    if result["context"] is not None:
        result["context"]["why"] = why
    if compiles and target is not None:
        result["compiled"] = _compiled(experiment, target, vocab, estimate.memory.total)
    if target is not None:
        _judge(result, estimate, target)
    return result


def _check(experiment: Experiment, target: Target | None) -> None:
    if target is not None:
        train = experiment.train
        check_mesh(experiment.mesh, target, train.batch_size // train.accumulation_steps)
    tokens_of(experiment)


def vocab_size_of(experiment: Experiment) -> int:
    """Of the model: as a run would have it, without reading any data but the tokenizer."""
    from memtrain.data.tokenizer import load_tokenizer

    data, wanted = experiment.data, experiment.model.vocab_size
    task = next(iter(data.generated.values()), None)
    of_data = task.vocab_size if task else load_tokenizer(data.tokenizer).vocab_size
    if wanted is not None and wanted < of_data:
        raise BadInput(f"model.vocab_size={wanted} is smaller than the tokenizer's {of_data}")
    return wanted or of_data


class _Estimate:
    """Everything that is told of one experiment on one kind of device."""

    def __init__(self, experiment: Experiment, target: Target | None, vocab: int):
        self.experiment, self.target, self.vocab = experiment, target, vocab
        platform = target.device.platform if target else "tpu"
        self.kinds = kinds_of_layers(experiment.model, vocab, experiment.train.seq_len)
        self.flops = sum((kind.flops for kind in self.kinds), Flops(0.0, 0.0, 0.0))
        self.memory: MemoryEstimate = estimate_memory(experiment, vocab, platform)
        self.step: StepTime | None = None
        if target is not None:
            self.step = predict(experiment, self.memory, self.flops, vocab, target.device)

    @property
    def fits(self) -> bool | None:
        if self.target is None:
            return None
        return self.memory.total <= self.target.device.memory_bytes

    def as_dict(self) -> dict[str, Any]:
        experiment, mesh = self.experiment, self.experiment.mesh
        train = experiment.train
        return {
            "name": experiment.name,
            "target": self.target.text if self.target else None,
            "device": self.target.device.name if self.target else None,
            "num_devices": mesh.num_devices,
            "mesh": mesh.sizes,
            "context": self._context() if mesh.context > 1 else None,
            "batch_size": train.batch_size,
            "seq_len": train.seq_len,
            "remat": experiment.model.remat,
            "num_parameters": sum(kind.parameters for kind in self.kinds),
            "layers": [_kind_row(kind, train.seq_len) for kind in self.kinds],
            "flops_per_token": {
                "matmul": self.flops.matmul,
                "attention": self.flops.attention,
                "memory": self.flops.memory,
                "forward": self.flops.total,
                "training": self.flops.training,
            },
            "memory": self._memory(),
            "step": self._step(),
            "shardings": [
                {
                    "name": leaf.name,
                    "shape": list(leaf.shape),
                    "dtype": leaf.dtype,
                    "axes": list(leaf.axes),
                    "sharding": leaf.spec,
                    "bytes_per_device": leaf.local,
                }
                for leaf in self.memory.state.parameters
            ],
        }

    def _context(self) -> dict[str, Any]:
        tokens = tokens_of(self.experiment)
        return {
            "layout": tokens.layout.kind,
            "strategy": tokens.strategy,
            "hops": {
                f"model.pattern.{block}": hops_of(layer, self.experiment)[0]
                for block, layer in attention_layers(self.experiment.model)
            },
        }

    def _memory(self) -> dict[str, Any]:
        devices, peak = self.experiment.mesh.num_devices, self.memory.peak
        device = self.target.device if self.target else None
        return {
            "parts": {
                part: {
                    "whole": size.whole,
                    "all_devices": size.local * devices,
                    "device": size.local,
                    "at_peak": peak.get(part, 0),
                }
                for part, size in self._parts().items()
            },
            "peak_moment": self.memory.peak_moment,
            "bytes_per_device": self.memory.total,
            "host_bytes_per_device": self.memory.state.on_host(),
            "device_bytes": device.memory_bytes if device else None,
            "fits": self.fits,
        }

    def _parts(self) -> dict[str, Size]:
        """Each part in full; at the peak there may be less of it."""
        state, moments = self.memory.state, self.memory.moments
        train = self.experiment.train
        held = {
            "parameters": Size(state.total().whole, state.parameters_on_device()),
            "optimizer": Size(state.optimizer.whole, state.optimizer_on_device()),
            "carry": state.carry,
            "gradients": state.gradients(train.batch_size * train.seq_len),
        }
        devices = self.experiment.mesh.num_devices
        for moment in moments.values():
            for part, size in moment.items():
                if part not in held or part not in ("parameters", "optimizer", "carry"):
                    most = max(held.get(part, Size()).local, size)
                    whole = held[part].whole if part == "gradients" else most * devices
                    held[part] = Size(whole, most)
        return {part: size for part, size in held.items() if size.local}

    def _step(self) -> dict[str, Any] | None:
        step = self.step
        if step is None:
            return None
        tokens = self.experiment.train.batch_size * self.experiment.train.seq_len
        return {
            **dataclasses.asdict(step),
            "tokens_per_second": tokens / step.seconds,
            "assumed_shares_of_peak": ASSUMED,
        }


def _kind_row(kind: Kind, seq_len: int) -> dict[str, Any]:
    flops = kind.flops
    return {
        "kind": kind.kind,
        "layers": kind.layers,
        "parameters": kind.parameters,
        "flops_per_token": flops.total,
        "of_it_attention": flops.attention,
        "of_it_memory": flops.memory,
        "state_bytes_per_token": kind.bytes_per_token,
        "state_bytes_per_sequence": kind.bytes_per_sequence,
        "state_bytes_at_seq_len": kind.bytes_per_sequence + kind.bytes_per_token * seq_len,
    }


def _compiled(experiment: Experiment, target: Target, vocab: int, estimate: int) -> dict[str, Any]:
    print(f"memtrain: compiling the train step for {target.text}", file=sys.stderr, flush=True)
    found = compile_train_step(experiment, target, vocab)
    return {
        **{k: v for k, v in dataclasses.asdict(found).items() if k != "overlap"},
        "bytes_per_device": found.total,
        "estimate_over_compiler": estimate / found.total,
        "permutes": dataclasses.asdict(found.overlap),
    }


def _judge(result: dict[str, Any], estimate: _Estimate, target: Target) -> None:
    """Enters the longest context that fits; and where this one does not, what would."""
    experiment, device = estimate.experiment, target.device
    result["longest_seq_len"] = longest_context(experiment, estimate.vocab, device)
    # Where the compiler was asked, its word counts.
    needed = result.get("compiled", {}).get("bytes_per_device", estimate.memory.total)
    if needed <= device.memory_bytes:
        return
    over = needed - device.memory_bytes
    change = smallest_change(experiment, estimate.vocab, device)
    said = f"the smallest change that fits is --set {change}" if change else "no setting helps"
    if not change:
        said += f": take more than {target.num_devices} devices, or a smaller model"
    result["change_that_fits"] = change
    result["error"] = (
        f"the plan does not fit: a device needs {gib(needed)} and a {device.name} has "
        f"{gib(device.memory_bytes)}, {gib(over)} too little; {said}"
    )
    result["exit_code"] = BAD_INPUT


def _swept(
    experiment: Experiment,
    sweep: Sweep,
    target: Target | None,
    *,
    compiles: bool,
    plot: Path | None,
) -> dict[str, Any]:
    rows = []
    for value, point in zip(sweep.values, sweep.points, strict=True):
        if target is not None:
            point, _ = on_device(point, target.device.device_kind)
        vocab = vocab_size_of(point)
        estimate = _Estimate(point, target, vocab)
        told = estimate.as_dict()
        row = {
            sweep.key: value,
            "num_devices": told["num_devices"],
            "bytes_per_device": told["memory"]["bytes_per_device"],
            "fits": told["memory"]["fits"],
            "peak_moment": told["memory"]["peak_moment"],
            "parts": {k: v["at_peak"] for k, v in told["memory"]["parts"].items() if v["at_peak"]},
        }
        if told["step"] is not None:
            row |= {
                "seconds": told["step"]["seconds"],
                "tokens_per_second": told["step"]["tokens_per_second"],
                "bound": told["step"]["bound"],
            }
        if compiles and target is not None:
            found = _compiled(point, target, vocab, estimate.memory.total)
            row["compiled_bytes_per_device"] = found["bytes_per_device"]
        rows.append(row)
    result: dict[str, Any] = {
        "name": experiment.name,
        "target": target.text if target else None,
        "device_bytes": target.device.memory_bytes if target else None,
        "sweep": rows,
    }
    if plot is not None:
        draw(result, sweep.key, plot)
        result["plot"] = str(plot)
    return result


def gib(size: float) -> str:
    """Bytes for people."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(size) >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{math.ceil(size)} B"
