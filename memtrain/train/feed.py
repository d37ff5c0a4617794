"""Batches of the host to the devices."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from memtrain.data.batch import Batch
from memtrain.parallel.sharding import batch_sharding


def on_devices(batches: Iterator[Batch], mesh: Mesh) -> Iterator[Batch]:
    """Each process's rows become its part of the global batch; one batch is sent ahead."""
    sharding = batch_sharding(mesh)

    def put(batch: Batch) -> Batch:
        return Batch(*(jax.make_array_from_process_local_data(sharding, a) for a in batch))

    ahead = [put(batch) for batch in itertools.islice(batches, 1)]
    for batch in batches:
        ahead.append(put(batch))
        yield ahead.pop(0)
    yield from ahead
