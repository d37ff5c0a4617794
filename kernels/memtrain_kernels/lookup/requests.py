"""Rows of a table that is sharded over devices, each asked of the device that has it.

A request is one token's wish to one device: up to L slots with their weights, answered by their
weighted sum. A sum instead of the rows themselves, since a token that reads K rows of n devices has
about K / n with each: one answer of V numbers where rows would be K / n. A token that wants more
than L rows of a device makes several requests, so that shapes are static; where a token seldom
wants two rows of a device, L is 1, and an answer is a row.

Nothing is dropped, whatever the skew: a device has room for S requests to each other device, and
all go on, round after round, until the fullest is served. The number of rounds is agreed by a
maximum over all devices of the program, so that no device waits for one that has left the loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memtrain_kernels.lookup.bag_gradient import accumulation_dtype, weights_gradient
from memtrain_kernels.lookup.exchange import add_to_rows
from memtrain_kernels.lookup.weighted_gather import bag
from memtrain_kernels.varying import vary_alike, vary_as


class Pairs(NamedTuple):
    """A chunk's P = C * K reads in the order of owner, then token, then k.

    owner: the device that has the row, n for none. row: of the owner's shard. pair: m * K + k.
    request: the place of the read's request among those to its owner. lane: in the request, < L.
    """

    owner: jax.Array
    row: jax.Array
    pair: jax.Array
    token: jax.Array
    request: jax.Array
    lane: jax.Array


class Round(NamedTuple):
    """What one round asks: R = n * S requests, those to one device together.

    slots [R, L], -1 where there is none; weights [R, L]; token [R], whose request it is, -1 where
    there is none; target [P], where in R * L each read is, beyond where not in this round.
    """

    slots: jax.Array
    weights: jax.Array
    token: jax.Array
    target: jax.Array


@dataclass(frozen=True)
class Requests:
    """See the module. lanes: L. capacity: S. everywhere: all axes whose devices run the program."""

    axis: tuple[str, ...]
    num_devices: int
    lanes: int
    capacity: int
    everywhere: tuple[str, ...]

    def read(self, table_NV, slots_CK, weights_CK):
        C, dtype = slots_CK.shape[0], accumulation_dtype(table_NV)
        pairs = self._sort(slots_CK, table_NV.shape[0])

        def round_of(r: jax.Array, y_CV: jax.Array) -> jax.Array:
            asked = self._round(pairs, weights_CK, r)
            sums_RV = bag(table_NV, self._swap(asked.slots), self._swap(asked.weights))
            return self._add_home(y_CV, asked.token, self._swap(sums_RV))

        y_CV = vary_as(jnp.zeros((C, table_NV.shape[1]), dtype), slots_CK)
        return lax.fori_loop(0, self._rounds(pairs), round_of, y_CV)

    def push(self, total_NV, table_NV, slots_CK, weights_CK, dy_CV):
        pairs = self._sort(slots_CK, table_NV.shape[0])

        def round_of(r, state):
            total_NV, d_P = state
            asked = self._round(pairs, weights_CK, r)
            dy_RV = self._swap(dy_CV[jnp.maximum(asked.token, 0)])
            slots_RL, weights_RL = self._swap(asked.slots), self._swap(asked.weights)
            if total_NV is not None:
                total_NV = add_to_rows(total_NV, slots_RL, weights_RL, dy_RV)
            d_RL = self._swap(weights_gradient(table_NV, slots_RL, dy_RV))
            here_P = d_RL.reshape(-1).at[asked.target].get(mode="fill", fill_value=0)
            return total_NV, d_P + here_P

        d_P = jnp.zeros(slots_CK.size, accumulation_dtype(table_NV, dy_CV))
        d_P = vary_as(d_P, slots_CK)
        total_NV, d_P = lax.fori_loop(0, self._rounds(pairs), round_of, (total_NV, d_P))
        d_P = jnp.zeros_like(d_P).at[pairs.pair].set(d_P, unique_indices=True)
        return total_NV, d_P.reshape(slots_CK.shape)

    def _sort(self, slots_CK: jax.Array, rows: int) -> Pairs:
        n, K = self.num_devices, slots_CK.shape[1]
        iota_P = vary_as(lax.iota(jnp.int32, slots_CK.size), slots_CK)
        slots_P = slots_CK.reshape(-1)
        owner_P = jnp.where(slots_P < 0, n, jnp.minimum(slots_P // rows, n))
        owner_P, pair_P = lax.sort((owner_P, iota_P), num_keys=1, is_stable=True)
        token_P = pair_P // K
        new_owner_P = _changes(owner_P)
        new_token_P = new_owner_P | _changes(token_P)
        place_P = iota_P - lax.cummax(jnp.where(new_token_P, iota_P, 0))
        lane_P = place_P % self.lanes
        request_P = jnp.cumsum(lane_P == 0, dtype=jnp.int32) - 1
        request_P -= lax.cummax(jnp.where(new_owner_P, request_P, 0))
        row_P = slots_P[pair_P] - owner_P * rows
        return Pairs(owner_P, row_P, pair_P, token_P, request_P, lane_P)

    def _rounds(self, pairs: Pairs) -> jax.Array:
        fullest = jnp.max(jnp.where(pairs.owner < self.num_devices, pairs.request + 1, 0))
        fullest, _ = vary_alike(fullest, lax.axis_index(self.everywhere))
        return -(-lax.pmax(fullest, self.everywhere) // self.capacity)

    def _round(self, pairs: Pairs, weights_CK: jax.Array, r: jax.Array) -> Round:
        R, L = self.num_devices * self.capacity, self.lanes
        place_P = pairs.request - r * self.capacity
        now_P = (pairs.owner < self.num_devices) & (place_P >= 0) & (place_P < self.capacity)
        at_P = pairs.owner * self.capacity + place_P
        # Whatever is not in this round gets a target of its own outside: all are then unique.
        outside_P = lax.iota(jnp.int32, pairs.pair.size)
        target_P = jnp.where(now_P, at_P * L + pairs.lane, R * L + outside_P)
        first_P = jnp.where(now_P & (pairs.lane == 0), at_P, R + outside_P)

        def placed(values_P: jax.Array, target_P: jax.Array, size: int, fill: int) -> jax.Array:
            empty = vary_as(jnp.full(size, fill, values_P.dtype), values_P)
            return empty.at[target_P].set(values_P, mode="drop", unique_indices=True)

        return Round(
            placed(pairs.row, target_P, R * L, -1).reshape(R, L),
            placed(weights_CK.reshape(-1)[pairs.pair], target_P, R * L, 0).reshape(R, L),
            placed(pairs.token, first_P, R, -1),
            target_P,
        )

    def _swap(self, x_R: jax.Array) -> jax.Array:
        """Requests to the devices they are for, or answers back: what is sent is R rows."""
        # Kept apart: XLA on CPU would compute x once for every device that it is sent to.
        return lax.all_to_all(lax.optimization_barrier(x_R), self.axis, 0, 0, tiled=True)

    def _add_home(self, y_CV: jax.Array, token_R: jax.Array, sums_RV: jax.Array) -> jax.Array:
        ones = vary_as(jnp.ones((token_R.size, 1), y_CV.dtype), token_R)
        return add_to_rows(y_CV, token_R[:, None], ones, sums_RV)


def _changes(x_P: jax.Array) -> jax.Array:
    """Whether an entry differs from the one before it; the first counts as different."""
    first = vary_as(jnp.ones((1,), bool), x_P)
    return jnp.concatenate([first, x_P[1:] != x_P[:-1]])
