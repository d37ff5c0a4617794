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
from memtrain.train.optimizer import global_norm, schedule_of
from memtrain.train.state import Plan, TrainState
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
    report, and the gradients of that sum for all that is trained. For use inside jit, the batch in
    natural order."""
    config = plan.experiment.train
    model_config = plan.experiment.model
    chunk, matmul = model_config.loss_chunk_tokens, model_config.dtypes.matmul
    trained = plan.group("main") | plan.group("table")

    def loss_sum(parameters, batch: Batch, carry):
        model = plan.skeleton.merge(parameters)
        ctx = context_of(batch, layout=plan.tokens.layout, want_metrics=True)
        hidden, carry, aux = model(batch.tokens, carry, ctx)
        loss = cross_entropy_over_devices(
            hidden, model.head(), batch.targets, batch.loss_weights, chunk, matmul
        )
        # An auxiliary loss is per token: it counts as often as there are weighted tokens.
        extra = sum(_aux_losses(aux)) * jnp.sum(batch.loss_weights)
        return loss + extra, (loss, jax.lax.stop_gradient(carry), _aux_metrics(aux))

    def gradients(parameters, batch: Batch, carry):
        frozen = {n: a for n, a in parameters.items() if n not in trained}
        moving = {n: a for n, a in parameters.items() if n in trained}
        function = jax.value_and_grad(lambda p: loss_sum(p | frozen, batch, carry), has_aux=True)
        (_, (loss, carry, metrics)), grads = function(moving)
        return loss, carry, metrics, grads

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
            loss, state, metrics, grads = gradients(parameters, rows, state)
            return jax.tree.map(jnp.add, total, (loss, grads)), (state, metrics)

        zeros = {n: jnp.zeros(a.shape, jnp.float32) for n, a in parameters.items() if n in trained}
        xs = (jax.tree.map(split, batch), jax.tree.map(split, carry))
        (loss, grads), (carry, metrics) = jax.lax.scan(
            body, (jnp.zeros((), jnp.float32), zeros), xs
        )
        metrics = jax.tree.map(lambda m: jnp.mean(m, axis=0), metrics)
        return loss, jax.tree.map(join, carry), metrics, grads

    def loss_and_gradients(parameters, batch: Batch, carry):
        with kernels_over(plan.mesh, plan.tokens):
            return accumulated(parameters, arranged(batch, plan), carry)

    return loss_and_gradients


def make_train_step(plan: Plan) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One update. Loss is the sum over weighted tokens divided by their weight in the whole batch,
    however many devices and accumulation steps it is spread over."""
    loss_and_gradients = make_loss_and_gradients(plan)
    learning_rate = schedule_of(
        plan.experiment.optimizer,
        plan.experiment.optimizer.learning_rate,
        plan.experiment.train.num_steps,
    )
    trained = plan.group("main") | plan.group("table")

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, carry, memory, grads = loss_and_gradients(state.parameters, batch, state.carry)
        weight = jnp.sum(batch.loss_weights)
        scale = 1.0 / jnp.maximum(weight, 1e-9)
        loss = loss * scale
        grads = {n: g * scale for n, g in grads.items()}
        main = global_norm(grads, plan.group("main"))
        table = global_norm(grads, plan.group("table"))
        good = jnp.isfinite(loss) & jnp.isfinite(main) & jnp.isfinite(table)

        frozen = {n: jnp.zeros_like(a) for n, a in state.parameters.items() if n not in trained}
        updates, optimizer = plan.optimizer.update(
            grads | frozen, state.optimizer, state.parameters
        )
        parameters = optax.apply_updates(state.parameters, updates)
        # A skipped step leaves everything as it was before it, the memories' state too.
        keep = lambda new, old: jnp.where(good, new, old)  # noqa: E731
        metrics = {
            "train/loss": loss,
            "train/tokens_weighted": weight,
            "train/grad_norm": main,
            # The optimizer counts the steps that were not skipped.
            "train/learning_rate": learning_rate(state.step - state.skipped),
            "train/skipped_steps": state.skipped + ~good,
            "train/skipped_in_row": jnp.where(good, 0, state.skipped_in_row + 1),
            **{f"memory/{name}": value for name, value in memory.items()},
        }
        if plan.group("table"):
            metrics["train/table_grad_norm"] = table
        return (
            TrainState(
                step=state.step + 1,
                parameters=jax.tree.map(keep, parameters, state.parameters),
                optimizer=jax.tree.map(keep, optimizer, state.optimizer),
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
        in_shardings=(shardings, _batch_shardings(plan)),
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
            plan.skeleton.shardings(plan.mesh),
            _batch_shardings(plan),
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


def _batch_shardings(plan: Plan) -> Any:
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
