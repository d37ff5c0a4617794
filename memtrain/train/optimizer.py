"""AdamW with parameter groups and schedules, from optax.

Three groups: memory tables (own learning rate and clip, no weight decay), frozen parameters, and
all the rest, of which only matrices are decayed. Tables that are updated lazily are not optax's:
see `memtrain.train.tables`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from memtrain.errors import BadInput
from memtrain.train.config import OptimizerConfig, Schedule
from memtrain_kernels import RowGradients


def schedule_of(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by step of all but the tables. `num_steps`: the horizon, unless configured."""
    return _schedule(
        config, config.schedule, config.learning_rate, config.final_fraction, num_steps
    )


def table_schedule_of(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate of memory tables by step."""
    fraction = config.table_final_fraction
    return _schedule(
        config,
        config.table_schedule or config.schedule,
        config.table_learning_rate,
        config.final_fraction if fraction is None else fraction,
        num_steps,
    )


def _schedule(
    config: OptimizerConfig, kind: Schedule, peak: float, final_fraction: float, num_steps: int
) -> optax.Schedule:
    """Linear warm-up, then cosine, linear, warm-up-stable-decay, or constant."""
    horizon = config.horizon_steps or num_steps
    warmup = min(config.warmup_steps, horizon)
    final = peak * final_fraction
    decay = round(horizon * config.decay_fraction)
    if kind == "constant":
        after = optax.constant_schedule(peak)
    elif kind == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, horizon - warmup), final_fraction)
    elif kind == "linear":
        after = optax.linear_schedule(peak, final, max(1, horizon - warmup))
    else:
        stable = max(0, horizon - warmup - decay)
        after = optax.join_schedules(
            [
                optax.constant_schedule(peak),
                optax.linear_schedule(peak, final, max(1, decay)),
            ],
            [stable],
        )
    if warmup == 0:
        return after
    # Step 0 already learns: a first step at rate zero is a step wasted.
    return optax.join_schedules(
        [optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1)), after], [warmup]
    )


def groups_of(
    shapes: Mapping[str, jax.ShapeDtypeStruct], tables: set[str], frozen: set[str]
) -> dict[str, str]:
    """ "table", "frozen" or "main" for each parameter."""
    return {
        name: "frozen" if name in frozen else "table" if name in tables else "main"
        for name in shapes
    }


def is_matrix(name: str, axes: tuple[str | None, ...]) -> bool:
    """Whether weight decay applies: at least two dimensions besides `layers` and `rates`."""
    return sum(axis not in ("layers", "rates") for axis in axes) >= 2


def optimizer_of(
    config: OptimizerConfig,
    num_steps: int,
    groups: Mapping[str, str],
    axes: Mapping[str, tuple[str | None, ...]],
) -> optax.GradientTransformation:
    """The update of all groups. Clipping is by the global norm within a group."""
    if not 0 <= config.decay_fraction <= 1:
        raise BadInput(f"optimizer.decay_fraction={config.decay_fraction} must be between 0 and 1")

    def decayed(tree: Any) -> dict[str, bool]:
        return {name: is_matrix(name, axes[name]) for name in tree}

    def chain(clip: float | None, *rest: optax.GradientTransformation):
        first = [] if clip is None else [optax.clip_by_global_norm(clip)]
        return optax.chain(*first, *rest)

    main = chain(
        config.clip_norm,
        optax.adamw(
            schedule_of(config, num_steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )
    table = chain(
        config.table_clip_norm,
        optax.adam(
            table_schedule_of(config, num_steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
        ),
    )
    return optax.partition(
        {"main": main, "table": table, "frozen": optax.set_to_zero()}, dict(groups)
    )


def global_norm(tree: Mapping[str, jax.Array | RowGradients], names: set[str]) -> jax.Array:
    """The 2-norm of the named leaves together, in float32; 0 where there are none."""
    leaves = [tree[name] for name in sorted(names)]
    arrays = [leaf.rows if isinstance(leaf, RowGradients) else leaf for leaf in leaves]
    squares = [jnp.sum(jnp.square(a.astype(jnp.float32))) for a in arrays]
    return jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))


def clip_factor(norm: jax.Array, most: float | None) -> jax.Array:
    """What gradients of this norm are multiplied with, for theirs to be `most` at most."""
    if most is None:
        return jnp.ones((), jnp.float32)
    return jnp.where(norm < most, 1.0, most / norm)
