"""The train step and the evaluation step: pure functions under plain `jax.jit`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from memtrain.data.batch import Batch, empty_row
from memtrain.memory.protocol import Aux, Context
from memtrain.model.loss import cross_entropy_over_devices, token_losses_over_devices
from memtrain.model.parameters import Parameters
from memtrain.parallel.sharding import (
    batch_sharding,
    constrain_tokens,
    kernels_over,
    replicated,
)
from memtrain.train.optimizer import clip_factor, global_norm, schedule_of, table_schedule_of
from memtrain.train.row_adam import Now
from memtrain.train.segments import in_segments
from memtrain.train.state import Plan, TrainState
from memtrain.train.table_gradients import PREFIX, reads_of, taps_for
from memtrain.train.tables import OptimizerState, scaled
from memtrain_kernels import Layout


Metrics = dict[str, Array]


def context_of(
    batch: Batch,
    *,
    layout: Layout = Layout(),  # noqa: B008 (frozen)
    want_metrics: bool = False,
    want_reads: bool = False,
) -> Context:
    """layout: the order of the batch's tokens."""
    return Context(
        layout=layout,
        positions=batch.positions,  # type: ignore[arg-type]
        starts=batch.starts,  # type: ignore[arg-type]
        valid=batch.valid,  # type: ignore[arg-type]
        want_metrics=want_metrics,
        want_reads=want_reads,
    )


def make_loss_and_gradients(plan: Plan) -> Callable[..., tuple[Array, Any, Metrics, Parameters]]:
    """(parameters, batch, carry) -> the sum of the weighted losses, the new carry, what memories
    report, and the gradients of that sum for all that is trained: arrays, or `RowGradients` for
    tables of which the plan says so. For use inside jit, the batch in natural order."""
    config = plan.experiment.train
    model_config = plan.experiment.model
    chunk, matmul = model_config.loss_chunk_tokens, model_config.dtypes.matmul
    by_rows = sorted(plan.tables.by_rows)
    read = [name.removeprefix(PREFIX) for name in by_rows]
    trained = (plan.group("main") | plan.group("table")) - plan.tables.by_rows

    def loss_sum(parameters, taps, batch: Batch, carry):
        whole = config.tbptt_segments == 1
        function = of_row if whole else in_segments(of_row, config.tbptt_segments)
        total, (loss, carry, aux) = function(parameters, taps, batch, carry)
        return total, (loss, jax.lax.stop_gradient(carry), aux)

    def of_row(parameters, taps, batch: Batch, carry):
        model = plan.skeleton.merge(parameters)
        ctx = context_of(batch, layout=plan.tokens.layout, want_metrics=True)
        hidden, carry, aux = model(batch.tokens, carry, ctx, taps=taps)
        loss = cross_entropy_over_devices(
            hidden, model.head(), batch.targets, batch.loss_weights, chunk, matmul
        )
        # An auxiliary loss is per token: it counts as often as there are weighted tokens.
        extra = sum(_aux_losses(aux)) * jnp.sum(batch.loss_weights)
        return loss + extra, (loss, carry, aux)

    def gradients(parameters, batch: Batch, carry):
        frozen = {n: a for n, a in parameters.items() if n not in trained}
        moving = {n: a for n, a in parameters.items() if n in trained}
        taps = None
        if by_rows:
            tables = {name: parameters[PREFIX + name] for name in read}
            taps = taps_for(plan.tables.shapes, tables, *batch.tokens.shape)
        function = jax.value_and_grad(
            lambda p, taps: loss_sum(p | frozen, taps, batch, carry), argnums=(0, 1), has_aux=True
        )
        (_, (loss, carry, aux)), (grads, d_taps) = function(moving, taps)
        reads = reads_of(aux, d_taps, read) if by_rows else {}
        return loss, carry, _aux_metrics(aux), grads, reads

    def accumulated(parameters, batch: Batch, carry):
        """The sum of the parts' losses and gradients, one part at a time."""
        parts = config.accumulation_steps
        if parts == 1:
            return gradients(parameters, batch, carry)
        # Row r goes to part r mod parts: every part keeps rows of every device.
        split = lambda a: jnp.moveaxis(a.reshape(-1, parts, *a.shape[1:]), 1, 0)  # noqa: E731
        join = lambda a: jnp.moveaxis(a, 0, 1).reshape(-1, *a.shape[2:])  # noqa: E731

        def body(total, part):
            rows, state = part
            rows = jax.tree.map(constrain_tokens, rows)
            loss, state, metrics, grads, reads = gradients(parameters, rows, state)
            return jax.tree.map(jnp.add, total, (loss, grads)), (state, metrics, reads)

        zeros = {n: jnp.zeros(a.shape, jnp.float32) for n, a in parameters.items() if n in trained}
        xs = (jax.tree.map(split, batch), jax.tree.map(split, carry))
        (loss, grads), (carry, metrics, reads) = jax.lax.scan(
            body, (jnp.zeros((), jnp.float32), zeros), xs
        )
        metrics = jax.tree.map(lambda m: jnp.mean(m, axis=0), metrics)
        # Kept as they are until all parts are read: a sum of rows would be larger than its reads.
        reads = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), reads)
        return loss, jax.tree.map(join, carry), metrics, grads, reads

    def loss_and_gradients(parameters, batch: Batch, carry):
        with kernels_over(plan.mesh, plan.tokens):
            arrangement = arranged(batch, plan)
            loss, carry, metrics, grads, reads = accumulated(parameters, arrangement, carry)
        return loss, carry, metrics, grads | plan.tables.gradients(reads)

    return loss_and_gradients


def make_train_step(plan: Plan) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One update. Loss is the sum over weighted tokens divided by their weight in the whole batch,
    however many devices and accumulation steps it is spread over."""
    loss_and_gradients = make_loss_and_gradients(plan)
    config, tables = plan.experiment.optimizer, plan.tables
    learning_rate = schedule_of(config, plan.experiment.train.num_steps)
    table_learning_rate = table_schedule_of(config, plan.experiment.train.num_steps)
    trained = plan.group("main") | plan.group("table")

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, carry, memory, grads = loss_and_gradients(state.parameters, batch, state.carry)
        # After the gradients: simulated devices would enter this sum and those of a loop over parts
        # of the batch in different orders, and wait for each other for ever.
        weights, loss = jax.lax.optimization_barrier((batch.loss_weights, loss))
        weight = jnp.sum(weights)
        scale = 1.0 / jnp.maximum(weight, 1e-9)
        loss = loss * scale
        grads = {n: scaled(g, scale) for n, g in grads.items()}
        if tables.names:
            of_tables = {n: grads[n] for n in tables.names}
            grads |= tables.writable(of_tables, state.optimizer.tables)
        main = global_norm(grads, plan.group("main"))
        table = global_norm(grads, plan.group("table"))
        good = jnp.isfinite(loss) & jnp.isfinite(main) & jnp.isfinite(table)

        done = state.step - state.skipped  # what schedules count
        before = plan.without_lazy(state.parameters)
        old = state.optimizer.main if tables.names else state.optimizer
        frozen = {n: jnp.zeros_like(a) for n, a in state.parameters.items() if n not in trained}
        updates, optimizer = plan.optimizer.update(plan.without_lazy(grads) | frozen, old, before)
        # A skipped step leaves everything as it was before it, the memories' state too.
        keep = lambda new, old: jnp.where(good, new, old)  # noqa: E731
        parameters = jax.tree.map(keep, optax.apply_updates(before, updates), before)
        optimizer = jax.tree.map(keep, optimizer, old)
        if tables.names:
            now = Now(jnp.asarray(table_learning_rate(done)), state.step, _seed(state), good)
            factor = clip_factor(table, config.table_clip_norm)
            after, moments = tables.update(
                state.parameters,
                state.optimizer.tables,
                {n: scaled(grads[n], factor) for n in tables.names},
                now,
            )
            parameters, optimizer = parameters | after, OptimizerState(optimizer, moments)
        metrics = {
            "train/loss": loss,
            "train/tokens_weighted": weight,
            "train/grad_norm": main,
            "train/learning_rate": learning_rate(done),
            "train/skipped_steps": state.skipped + ~good,
            "train/skipped_in_row": jnp.where(good, 0, state.skipped_in_row + 1),
            **{f"memory/{name}": value for name, value in memory.items()},
        }
        if plan.group("table"):
            metrics["train/table_grad_norm"] = table
            metrics["train/table_learning_rate"] = table_learning_rate(done)
        for name in tables.by_rows:
            rows = state.parameters[name].shape[0]
            metrics[f"memory/{name}.slots_used"] = jnp.sum(grads[name].count) / rows
        return (
            TrainState(
                step=state.step + 1,
                parameters=parameters,
                optimizer=optimizer,
                carry=jax.tree.map(keep, carry, state.carry),
                rng=state.rng,
                skipped=metrics["train/skipped_steps"],
                skipped_in_row=metrics["train/skipped_in_row"],
            ),
            metrics,
        )

    shardings = plan.shardings()
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_shardings(plan)),
        out_shardings=(shardings, replicated(plan.mesh)),
        donate_argnums=0,
        compiler_options=_compiler_options(plan.mesh),
    )


def make_evaluation_step(plan: Plan) -> Callable[[Any, Batch, Any], tuple[dict[str, Any], Any]]:
    """Sums over a held-out batch: `nll` and `weight` in all, and of each position of the row; and
    the memories' state after it, where the run carries one. None reads it from empty memories."""
    model_config = plan.experiment.model
    chunk, matmul = model_config.loss_chunk_tokens, model_config.dtypes.matmul

    def evaluation_step(parameters, batch: Batch, carry: Any) -> tuple[dict[str, Any], Any]:
        model = plan.skeleton.merge(parameters)
        answers = batch.loss_weights
        with kernels_over(plan.mesh, plan.tokens):
            batch = arranged(batch, plan)
            ctx = context_of(batch, layout=plan.tokens.layout, want_metrics=True)
            hidden, carry, aux = model(batch.tokens, carry, ctx)
            nll, correct = token_losses_over_devices(
                hidden, model.head(), batch.targets, chunk, matmul
            )
        nll, correct = (plan.tokens.layout.restore(x) for x in (nll, correct))
        return {
            "nll": jnp.sum(nll * answers),
            "correct": jnp.sum(correct * answers),
            "weight": jnp.sum(answers),
            "nll_by_position": jnp.sum(nll * answers, axis=0),
            "weight_by_position": jnp.sum(answers, axis=0),
            "memory": _aux_metrics(aux),
        }, carry

    return jax.jit(
        evaluation_step,
        in_shardings=(
            plan.parameter_shardings(),
            batch_shardings(plan),
            plan.shardings().carry,
        ),
        out_shardings=(replicated(plan.mesh), plan.shardings().carry),
    )


def arranged(batch: Batch, plan: Plan) -> Batch:
    """A batch in natural order, its tokens put where the mesh wants them."""
    leaves: Any = batch
    arranged: Any = [constrain_tokens(plan.tokens.layout.arrange(leaf)) for leaf in leaves]
    return Batch(*arranged)


def abstract_batch(plan: Plan) -> Batch:
    """Shapes and shardings of what the step reads: to compile it before there is a batch."""
    config = plan.experiment.train
    row = empty_row(1)
    return Batch(
        *(
            jax.ShapeDtypeStruct(
                (config.batch_size, config.seq_len), leaf.dtype, sharding=batch_sharding(plan.mesh)
            )
            for leaf in row
        )  # type: ignore[arg-type]
    )


def _compiler_options(mesh: Mesh) -> dict[str, int] | None:
    """Where keys and values travel round a ring of GPUs: XLA holds one permute in flight unless it
    is told otherwise, and the ring's backward has two a hop."""
    if mesh.devices.flat[0].platform not in ("gpu", "cuda") or mesh.shape["context"] == 1:
        return None
    return {"xla_gpu_experimental_parallel_collective_overlap_limit": 2}


def _seed(state: TrainState) -> Array:
    """What rounding by chance draws from at this step."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    return jax.random.bits(key, (), jnp.uint32)


def batch_shardings(plan: Plan) -> Any:
    """A Batch of shardings."""
    each: Any = batch_sharding(plan.mesh)
    return Batch(*[each] * len(Batch._fields))


def _each_aux(aux: list[dict[str, Aux]]):
    for layer, places in enumerate(aux):
        for place, report in places.items():
            yield f"{layer}.{place}", report


def _aux_losses(aux: list[dict[str, Aux]]) -> list[Array]:
    return [loss for _, report in _each_aux(aux) for loss in report.losses.values()]


def _aux_metrics(aux: list[dict[str, Aux]]) -> Metrics:
    """`LAYER.PLACE.NAME` for every metric that a memory reports."""
    return {
        f"{where}.{name}": value
        for where, report in _each_aux(aux)
        for name, value in report.metrics.items()
    }
