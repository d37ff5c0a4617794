"""Decode kernels under automatic sharding: each device runs them on its own rows and heads.

As `memtrain_kernels.partition`, which says why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.decode.paging import Pages
from memtrain_kernels.partition import current_partition


Attend = Callable[[jax.Array, Pages, AttentionSpec, int | None], tuple[jax.Array, jax.Array]]


def over_devices(attend: Attend) -> Attend:
    """attend(q, pages, spec, num_splits) on each device's rows and heads.

    Of the pool each device takes its own key heads, and every page: page numbers mean the same on
    all of them.
    """
    found = current_partition()
    if found is None or found.mesh.size == 1 or jax.sharding.get_abstract_mesh().manual_axes:
        return attend
    part = found

    def split(
        q: jax.Array, pages: Pages, spec: AttentionSpec, num_splits: int | None
    ) -> tuple[jax.Array, jax.Array]:
        rows = part.axes(part.batch, q.shape[0])
        heads = part.axes(part.heads, q.shape[2], pages.num_kv_heads)
        pool = PartitionSpec(None, None, heads, None)
        scales: list[Any] = [
            None if x is None else PartitionSpec(*(None,) * (x.ndim - 1), heads)
            for x in (pages.k_scales, pages.v_scales)
        ]
        of_pages: list[Any] = [pool, pool, PartitionSpec(rows, None), PartitionSpec(rows), *scales]
        of_out = PartitionSpec(rows, None, heads, None)
        return jax.shard_map(
            lambda q, pages: attend(q, pages, spec, num_splits),
            mesh=part.mesh,
            in_specs=(of_out, Pages(*of_pages)),
            out_specs=(of_out, PartitionSpec(rows, None, heads)),
            check_vma=False,  # kernels say nothing of how their outputs vary
        )(q, pages)

    return split
