"""Rows in segments: truncated backpropagation through time.

A step's rows are read in equal parts, one after the other, under one loss; the state goes from part
to part, and gradients go back through it. Each part is computed again in the backward, so that the
activations of one are held at once, and the states between them.

What is learned is what the rows in one piece would teach, since what a token sees does not depend
on how its text is cut (laws 1 and 2): segments are a matter of memory alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from memtrain.memory.protocol import Aux


def in_segments(read: Callable[..., Any], count: int) -> Callable[..., Any]:
    """read(parameters, taps, batch, carry) -> (total, (loss, carry, aux)), in `count` parts.

    batch: arrays [B, T, ...], in natural order, with T a multiple of count; taps: of the same
    tokens in the same order. carry: a state, not None.
    """

    def cut(a: Array) -> Array:
        return jnp.moveaxis(a.reshape(a.shape[0], count, -1, *a.shape[2:]), 1, 0)

    def join(a: Array) -> Array:
        return jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:])

    def joined(report: Aux) -> Aux:
        """One call's, of all parts: losses are in the total already."""
        metrics = {name: jnp.mean(value, axis=0) for name, value in report.metrics.items()}
        return Aux(metrics=metrics, table_reads=jax.tree.map(join, report.table_reads))

    def whole(parameters, taps, batch, carry):
        def segment(carry, part):
            batch, taps = part
            total, (loss, carry, aux) = read(parameters, taps, batch, carry)
            return carry, (total, loss, aux)

        parts = jax.tree.map(cut, (batch, taps))
        carry, (total, loss, aux) = jax.lax.scan(jax.checkpoint(segment), carry, parts)
        is_aux = lambda node: isinstance(node, Aux)  # noqa: E731
        aux = jax.tree.map(joined, aux, is_leaf=is_aux)
        return jnp.sum(total), (jnp.sum(loss), carry, aux)

    return whole
