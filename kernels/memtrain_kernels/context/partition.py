"""`attention` under automatic sharding whose tokens are sharded: `context_attention` per device."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import PartitionSpec

from memtrain_kernels.announce import say_once
from memtrain_kernels.attention.merge import Partial
from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.context.api import context_attention
from memtrain_kernels.context.layout import Layout
from memtrain_kernels.partition import Partition, current_partition, is_manual, region


def sequence_partition(queries: int, keys: int) -> Partition | None:
    """The partition that splits a call of so many tokens; None where none does.

    Says once why a call is not split though its program is.
    """
    part: Partition | None = current_partition()
    if part is None or not part.splits_tokens or is_manual():
        return None
    if part.sequence in jax.sharding.get_abstract_mesh().manual_axes:
        return None  # The caller has one device's tokens in hand.
    multiple = layout_of(part).multiple
    if queries % multiple or keys % multiple:
        if queries > 1:
            say_once(
                f"attention of {queries} queries to {keys} keys is not split over mesh axis "
                f"{part.sequence!r}, its operands are gathered: the {part.layout} layout takes "
                f"multiples of {multiple}"
            )
        return None
    return part


def layout_of(part: Partition) -> Layout:
    """The layout of a partition's tokens."""
    assert part.sequence is not None
    return Layout(part.layout, part.mesh.shape[part.sequence])  # pyright: ignore[reportArgumentType]


def attention_over_tokens(
    part: Partition,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spec: AttentionSpec,
    tokens: dict[str, Any],
    sink_logits: jax.Array | None,
    prior: Partial | None,
    backend: str | None,
) -> Partial:
    """(out, lse) as `attention` gives them, of whole arrays in device order."""
    inner, outer = region(part)
    rows_over, heads_over = (
        tuple(n for n in names if n not in outer) for names in (part.batch, part.heads)
    )
    batch = part.axes(rows_over, q.shape[0])
    H, K = q.shape[2], k.shape[2]
    kv_heads = None if K == 1 else part.axes(heads_over, H, K)
    heads = part.axes(heads_over, H) if K == 1 else kv_heads  # one key head serves them all
    seq = part.sequence
    queries, keys = (PartitionSpec(batch, seq, h, None) for h in (heads, kv_heads))
    lse = PartitionSpec(batch, seq, heads)
    given = {name: _row(x) for name, x in tokens.items() if x is not None}
    rows = {
        name: PartitionSpec(batch if x.shape[0] > 1 else None, seq) for name, x in given.items()
    }

    def local(q, k, v, given, sink_logits, prior) -> Any:
        return context_attention(
            q,
            k,
            v,
            axis=seq,  # pyright: ignore[reportArgumentType]
            layout=part.layout,  # pyright: ignore[reportArgumentType]
            strategy=part.strategy,  # pyright: ignore[reportArgumentType]
            ulysses=part.ulysses,
            spec=spec,
            sink_logits=sink_logits,
            prior=prior,
            return_lse=True,
            backend=backend,
            **given,
        )

    return jax.shard_map(
        local,
        **inner,
        in_specs=(
            queries,
            keys,
            keys,
            rows,
            None if sink_logits is None else PartitionSpec(heads),
            None if prior is None else (queries, lse),
        ),
        out_specs=(queries, lse),
        check_vma=False,  # kernels say nothing of how their outputs vary
    )(q, k, v, given, sink_logits, prior)


def _row(x: Any) -> Any:
    """[T] or [B, T] as [B or 1, T]."""
    return x[None] if x.ndim == 1 else x
