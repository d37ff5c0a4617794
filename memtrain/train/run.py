"""The training run, from top to bottom. The same call resumes."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from memtrain.config import Experiment, check_resume, resolve_horizon
from memtrain.data.fingerprint import check_fingerprint
from memtrain.data.pipeline import Pipeline, build_pipeline
from memtrain.errors import BadInput, Preempted
from memtrain.files import write_whole
from memtrain.model.flops import forward_flops
from memtrain.model.parameters import count_parameters
from memtrain.parallel.mesh import initialize_distributed, local_rows, mesh_of
from memtrain.parallel.peak import peak_flops
from memtrain.train import records
from memtrain.train.checkpoint import CheckpointStore
from memtrain.train.clock import Clock, format_seconds, resident_bytes
from memtrain.train.evaluation import evaluate_batches
from memtrain.train.feed import on_devices
from memtrain.train.init_from import open_source
from memtrain.train.keep import has_checkpoints
from memtrain.train.metrics import FILE_NAME as METRICS
from memtrain.train.metrics import MetricsWriter, need_tensorboard, read_lines
from memtrain.train.profile import Profiler
from memtrain.train.room import check_room, device_bytes
from memtrain.train.row_edit import background_of, choose_rows
from memtrain.train.run_dir import RunLock
from memtrain.train.state import Plan, TrainState
from memtrain.train.step import make_evaluation_step, make_train_step
from memtrain.train.tables import usage


Progress = Callable[[str], None]
OnStep = Callable[[int, int], None]
SEEDS = "seeds.json"
"""In a folder of several seeds: mean and standard deviation of what they reached."""


def train(
    experiment: Experiment,
    run_dir: Path,
    *,
    recipe: str = "",
    seeds: Sequence[int] | None = None,
    progress: Progress = print,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Trains to `train.num_steps`, from the newest valid checkpoint if there is one.

    With `seeds`, one run for each in `run_dir/seed-N`, and the mean and standard deviation of what
    they reach. `progress` is handed every line, `on_step` the steps begun and the steps in all,
    both in the first process only. Returns the last metrics. Raises MemtrainError with the
    documented exit codes.
    """
    initialize_distributed()
    if seeds is None:
        return _train_one(experiment, run_dir, recipe, progress, on_step)
    results = []
    for seed in seeds:
        progress(f"seed {seed}")
        seeded = dataclasses.replace(
            experiment, train=dataclasses.replace(experiment.train, seed=seed)
        )
        last = seed == seeds[-1]
        results.append(
            _train_one(seeded, run_dir / f"seed-{seed}", recipe, progress, on_step, last=last)
        )
    spread = {"seeds": list(seeds), **_spread(results)}
    if jax.process_index() == 0:
        write_whole(run_dir / SEEDS, json.dumps(spread, indent=2) + "\n")
    return {"run_dir": str(run_dir), **spread, "runs": results}


def _train_one(
    experiment: Experiment,
    run_dir: Path,
    recipe: str,
    progress: Progress,
    on_step: OnStep | None,
    *,
    last: bool = True,
) -> dict[str, Any]:
    """`last`: no other run of the job comes after this one."""
    is_first = jax.process_index() == 0
    say = progress if is_first else lambda line: None

    # Everything that can be wrong is found before anything is written.
    stored = records.read_experiment(run_dir)
    experiment = resolve_horizon(stored, experiment)
    if stored is not None:
        for key, old, new in check_resume(stored, experiment):
            say(f"{key}: {old} -> {new}")
    config = experiment.train
    mesh = mesh_of(experiment.mesh)
    pipeline = build_pipeline(
        experiment.data, seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed
    )
    fingerprint = pipeline.fingerprint()
    if "fingerprint" in (run := records.read_run(run_dir)):
        check_fingerprint(run["fingerprint"], fingerprint)
    plan = Plan.of(experiment, _vocab_size(experiment, pipeline), mesh)
    check_room(plan, device_bytes(jax.local_devices()[0]))
    for reason in (plan.tokens.why, *plan.tables.why):
        if reason:
            say(reason)
    source = background = None
    if config.init_from is not None and not has_checkpoints(run_dir / records.CHECKPOINTS):
        source = open_source(config.init_from, plan)
        if config.edit is not None:
            background = background_of(source, plan, say)
    if config.tensorboard:
        need_tensorboard()

    with (
        _written_by_us(run_dir, is_first),
        CheckpointStore(
            run_dir / records.CHECKPOINTS,
            keep=config.keep_checkpoints,
            keep_every_steps=config.keep_every_steps,
        ) as store,
        _Stop() as stop,
    ):
        candidate = store.newest_valid()
        if is_first:
            records.write_records(run_dir, experiment, recipe=recipe, fingerprint=fingerprint)
        store.warm_up()
        if candidate is not None:
            state = store.restore(candidate.step, plan.abstract())
            say(f"resumed from step {candidate.step} of {run_dir}")
            if candidate.step >= config.num_steps:
                say(f"nothing is left to train: raise train.num_steps={config.num_steps} to go on")
        else:
            state = plan.init()
            if source is not None:
                state = source.into(state, plan, say)
            if background is not None:
                state = choose_rows(state, plan, pipeline, background, say)
        writer = MetricsWriter(
            run_dir,
            resume_step=candidate.step if candidate else 0,
            tensorboard=config.tensorboard,
            enabled=is_first,
        )
        profiler = Profiler(run_dir, config.profile_steps)
        loop = _Loop(plan, pipeline, store, writer, profiler, say, on_step if is_first else None)
        try:
            result = loop.run(state, stop)
        finally:
            profiler.close()
            writer.close()
        if stop.asked and not last:
            # The signal came with the last steps: this run is done, the job is not.
            raise Preempted(f"stopped by {stop.asked} at the end of {run_dir}: run again to go on")
    return {"run_dir": str(run_dir), **_last_values(run_dir), **result}


class _Loop:
    """The loop and what it looks at. `run` reads from top to bottom."""

    def __init__(
        self,
        plan: Plan,
        pipeline: Pipeline,
        store: CheckpointStore,
        writer: MetricsWriter,
        profiler: Profiler,
        say: Progress,
        on_step: OnStep | None,
    ):
        self.plan, self.pipeline, self.store, self.writer = plan, pipeline, store, writer
        self.profiler, self.say, self.on_step = profiler, say, on_step
        self.config = plan.experiment.train
        self.tokens_per_step = self.config.batch_size * self.config.seq_len
        self.clock = Clock()
        self.untimed = 0
        index, count = local_rows(plan.mesh)
        self.rows = {"process_index": index, "process_count": count}
        self.saved: int | None = None
        self.last: dict[str, Any] = {}

    def run(self, state: TrainState, stop: _Stop) -> dict[str, Any]:
        config, plan = self.config, self.plan
        step = first = int(state.step)
        self.describe()
        train_step = make_train_step(plan)
        batches = on_devices(
            self.pipeline.batches(step * config.batch_size, **self.rows), plan.mesh
        )
        losses: list[tuple[jax.Array, jax.Array]] = []
        pending: tuple[int, int, dict[str, jax.Array]] | None = None
        while step < config.num_steps and not stop.asked_at(step):
            batch = next(batches)
            with self.profiler.step(step):
                state, metrics = train_step(state, batch)
            self.profiler.after(step, metrics)
            step += 1
            self.keep_up(step, metrics)
            if self.on_step is not None:
                self.on_step(step, config.num_steps)
            if step == first + 1:
                jax.block_until_ready(metrics)
                self.say(f"first step after {self.clock.elapsed():.1f}s")
                self.clock.lap()
                self.untimed = 1
            # Metrics are read one step late, so that the devices never wait for the host.
            pending = self.flush(pending, losses)
            losses.append((metrics["train/loss"], metrics["train/skipped_in_row"]))
            if step % config.log_every_steps == 0 or step == config.num_steps:
                pending = (step, len(losses), metrics)
            evaluates = self.is_due(step, config.evaluate_every_steps)
            saves = self.is_due(step, config.checkpoint_every_steps)
            if evaluates or saves:
                pending = self.flush(pending, losses)
            if evaluates:
                self.evaluate(step, state)
            if saves:
                self.checkpoint(step, state)
            self.store.poll()
        self.flush(pending, losses)
        if stop.asked and step < config.num_steps:
            if step == self.saved:
                self.store.close()
            else:
                self.checkpoint(step, state, wait=True)
            raise Preempted(f"stopped by {stop.asked} and saved at step {step}: run again to go on")
        if not self.last and step > 0:
            self.evaluate(step, state)
        self.store.close()
        return {"step": step, "tokens": step * self.tokens_per_step, **self.last}

    def is_due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.config.num_steps

    def flush(self, pending, losses: list[tuple[jax.Array, jax.Array]]) -> None:
        if pending is not None:
            step, count, metrics = pending
            self.log(step, count, metrics, losses)

    def log(self, step: int, count: int, metrics: dict[str, jax.Array], losses: list) -> None:
        """One dense line, and one of metrics.jsonl. `count` losses are of this interval."""
        values: dict[str, Any] = {name: np.asarray(v).item() for name, v in metrics.items()}
        interval = [float(np.asarray(loss)) for loss, _ in losses[:count]]
        skipped_in_row = max(int(np.asarray(skipped)) for _, skipped in losses[:count])
        del losses[:count]
        seconds = self.clock.lap()
        # A skipped step's loss is no number; what is told is the mean of the others.
        finite = [loss for loss in interval if math.isfinite(loss)]
        values["train/loss"] = statistics.fmean(finite) if finite else math.nan
        # The first step of a process is mostly compilation: neither its time nor its tokens count.
        steps, self.untimed = len(interval) - self.untimed, 0
        rate = self.tokens_per_step * steps / max(seconds, 1e-9) if steps else math.nan
        values |= {
            "tokens": step * self.tokens_per_step,
            "tokens_per_second": rate,
            "goodput": self.clock.goodput(),
            "seconds": self.clock.elapsed(),
            "host_resident_bytes": resident_bytes(),
        }
        if self.peak is not None and steps:
            values["mfu"] = rate * self.flops.training / self.peak
        self.writer.write(step, values)
        left = (self.config.num_steps - step) * seconds / max(steps, 1)
        self.say(
            f"step {step:>6}/{self.config.num_steps} | loss {values['train/loss']:.4f} | "
            f"lr {values['train/learning_rate']:.2e} | grad {values['train/grad_norm']:.2f} | "
            f"{f'{rate:,.0f}' if steps else '-':>7} tok/s | mfu {_percent(values.get('mfu'))} | "
            f"eta {format_seconds(left) if steps else '-'}"
            + (f" | skipped {values['train/skipped_steps']}" * (values["train/skipped_steps"] > 0))
        )
        if skipped_in_row > self.config.max_skipped_steps:
            raise BadInput(
                f"step {step}: loss or gradient not finite for {skipped_in_row} "
                "steps in a row (train.max_skipped_steps); lower optimizer.learning_rate, or look "
                "at the data of these steps"
            )

    def evaluate(self, step: int, state: TrainState) -> None:
        if not self.validation_batches:
            return
        with self.clock.pause("evaluation"):
            found = evaluate_batches(
                self.evaluation_step,
                state.parameters,
                self.validation_batches,
                carry=self.plan.empty_carry(state.parameters),
                bytes_per_token=self.bytes_per_token,
            )
        if self.plan.tables.names:
            shares = usage(state.optimizer.tables, step)
            found |= {name: np.asarray(share).item() for name, share in shares.items()}
        self.writer.write(step, found)
        self.last |= {k: v for k, v in found.items() if isinstance(v, float)}
        name = "bits_per_byte" if "validation/bits_per_byte" in found else "accuracy"
        self.say(
            f"step {step:>6} | held out: loss {found['validation/loss']:.4f}, "
            f"{name.replace('_', ' ')} {found['validation/' + name]:.4f}"
        )

    def checkpoint(self, step: int, state: TrainState, *, wait: bool = False) -> None:
        with self.clock.pause("checkpoint"):
            self.store.save(
                step,
                state,
                {
                    "experiment": records.to_dict(self.plan.experiment),
                    "cursor": {"samples": step * self.config.batch_size},
                    "fingerprint": self.pipeline.fingerprint(),
                    "vocab_size": self.plan.skeleton.vocab_size,
                },
                wait=wait,
            )
        self.saved = step

    def keep_up(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """No step counts as done that leads the newest valid checkpoint by more than was allowed.

        `step` was begun already, so that the devices work while the save goes on.
        """
        if self.saved is None or step <= self.saved + self.config.checkpoint_lag_steps:
            return
        if self.store.is_saving:
            jax.block_until_ready(metrics)
            with self.clock.pause("checkpoint"):
                self.store.wait()

    def describe(self) -> None:
        """Prints what will be trained, and prepares what the log lines count from."""
        skeleton, experiment = self.plan.skeleton, self.plan.experiment
        self.evaluation_step = make_evaluation_step(self.plan)
        self.bytes_per_token = (
            self.pipeline.bytes_per_token("validation") if self.pipeline.tokenizer else None
        )
        validation = self.pipeline.validation_batches(self.config.evaluate_batches, **self.rows)
        self.validation_batches = list(on_devices(iter(validation), self.plan.mesh))
        if not self.validation_batches and self.config.evaluate_batches:
            self.say("nothing is held out (data.validation_fraction): no evaluation while training")
        with jax.ensure_compile_time_eval():
            model = skeleton.merge(skeleton.shapes)  # type: ignore[arg-type]
        self.flops = forward_flops(model, self.config.seq_len)
        self.peak, source = peak_flops(self.plan.mesh.size, experiment.model.dtypes.matmul)
        tables = sum(skeleton.shapes[name].size for name in skeleton.tables)
        parameters = count_parameters(skeleton.shapes)
        self.say(
            f"{experiment.name}: {parameters / 1e6:.2f}M parameters ({tables / 1e6:.2f}M in memory "
            f"tables), {self.flops.training / 1e6:.1f} MFLOP a token, mesh "
            + " x ".join(f"{axis}={size}" for axis, size in self.plan.mesh.shape.items())
        )
        self.say(f"mfu counts from {source}")


class _Stop:
    """SIGTERM (preemption) and SIGINT ask for a stop at the next step; a second acts at once.

    In a job of several processes a SIGTERM to any of them stops all at the same step: JAX takes
    the signal and agrees on the step, so it is left to JAX there, and Ctrl-C is what it always is.
    """

    def __init__(self):
        self.asked: str | None = None
        self._before: dict[int, Any] = {}
        self._is_alone = jax.process_count() == 1

    def asked_at(self, step: int) -> bool:
        """Whether to stop before `step`. Called for every step, by every process."""
        if not self._is_alone and multihost_utils.reached_preemption_sync_point(step):
            self.asked = "SIGTERM"
        return self.asked is not None

    def __enter__(self) -> _Stop:
        if not self._is_alone:
            return self
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        except ValueError:  # not the main thread: whoever owns it decides
            self._before.clear()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = signal.Signals(number).name
        signal.signal(number, self._before[number])


def _written_by_us(run_dir: Path, is_first: bool):
    import contextlib

    return RunLock(run_dir) if is_first else contextlib.nullcontext()


def _vocab_size(experiment: Experiment, pipeline: Pipeline) -> int:
    wanted = experiment.model.vocab_size
    if wanted is not None and wanted < pipeline.vocab_size:
        raise BadInput(
            f"model.vocab_size={wanted} is smaller than the tokenizer's {pipeline.vocab_size}"
        )
    return wanted or pipeline.vocab_size


def _spread(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of every number that all of them report."""
    found = {}
    for name in results[0]:
        values = [r.get(name) for r in results]
        if all(isinstance(value, float) and math.isfinite(value) for value in values):
            values = [r[name] for r in results]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            found[name] = {"mean": statistics.fmean(values), "stdev": spread}
    return found


def _last_values(run_dir: Path) -> dict[str, float]:
    """The last training loss and speed that the run wrote, whichever process of it did."""
    found: dict[str, float] = {}
    for line in read_lines(run_dir / METRICS):
        for name in ("train/loss", "tokens_per_second"):
            if line.get(name) is not None:
                found[name] = line[name]
    return found


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"
