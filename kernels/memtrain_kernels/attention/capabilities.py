"""What a backend serves: a table that each one declares, and that tests hold it to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax

from memtrain_kernels.attention.spec import AttentionSpec


@dataclass(frozen=True)
class Problem:
    """One attention call without its numbers: B rows, T queries, S keys, H and K heads.

    positions, segments: whether they are given as arrays and not left to their defaults. lse:
    whether the log-sum-exp is needed (returned, or merged with a prior or with sink logits).
    """

    B: int
    T: int
    S: int
    H: int
    K: int
    head_dim: int
    value_dim: int
    dtype: str
    spec: AttentionSpec
    positions: bool = False
    segments: bool = False
    lse: bool = False

    @classmethod
    def of(
        cls,
        q: jax.Array | jax.ShapeDtypeStruct,
        k: jax.Array | jax.ShapeDtypeStruct,
        v: jax.Array | jax.ShapeDtypeStruct,
        spec: AttentionSpec,
        *,
        positions: bool = False,
        segments: bool = False,
        lse: bool = False,
    ) -> Problem:
        """The problem of arrays, or shapes: q [B, T, H, D], k [B, S, K, D], v [B, S, K, E]."""
        B, T, H, D = q.shape
        S, K, E = v.shape[1:]
        return cls(B, T, S, H, K, D, E, q.dtype.name, spec, positions, segments, lse)


@dataclass(frozen=True)
class Capabilities:
    """The table of one backend. A field that is True or None sets no limit.

    platform: the jax platform whose devices run it; None is every one. device_kinds: parts of
    `jax.Device.device_kind`, one of which must occur. head_dims, value_dims: the sizes that are
    served. equal_dims: value_dim must be head_dim. max_tokens: of queries and of keys.
    block_multiple: what the spec's block_q and block_kv must be multiples of; None if the backend
    takes none from the spec.
    square: as many queries as keys. verified_on: the device kinds on which its numbers were checked
    against the oracle; "*" is every one.
    """

    name: str
    platform: str | None = None
    device_kinds: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    head_dims: tuple[int, ...] | None = None
    value_dims: tuple[int, ...] | None = None
    equal_dims: bool = False
    windows: bool = True
    right_windows: bool = True
    prefix: bool = True
    soft_cap: bool = True
    sink_tokens: bool = True
    mask_fn: bool = True
    grouped_heads: bool = True
    positions: bool = True
    segments: bool = True
    lse: bool = True
    square: bool = False
    max_tokens: int | None = None
    block_multiple: int | None = 1
    verified_on: tuple[str, ...] = ()

    def refusal(self, problem: Problem) -> str | None:
        """Why this backend cannot serve the problem, in words for people; None if it can."""
        return next(self._refusals(problem), None)

    def _refusals(self, problem: Problem) -> Iterator[str]:
        spec = problem.spec
        if self.dtypes is not None and problem.dtype not in self.dtypes:
            yield f"dtype {problem.dtype}: it takes {', '.join(self.dtypes)}"
        for what, size, served in (
            ("head_dim", problem.head_dim, self.head_dims),
            ("value_dim", problem.value_dim, self.value_dims),
        ):
            if served is not None and size not in served:
                yield f"{what} {size}: it takes {', '.join(map(str, served))}"
        if self.equal_dims and problem.head_dim != problem.value_dim:
            yield f"value_dim {problem.value_dim}: it takes head_dim's {problem.head_dim}"
        for served, asked, what in (
            (self.windows, spec.window_left is not None, f"window {spec.window!r}"),
            (self.right_windows, spec.window_right is not None, f"window {spec.window!r}"),
            (self.prefix, bool(spec.prefix), f"prefix {spec.prefix}"),
            (self.soft_cap, spec.soft_cap is not None, f"soft_cap {spec.soft_cap}"),
            (self.sink_tokens, bool(spec.sink_tokens), f"sink_tokens {spec.sink_tokens}"),
            (self.mask_fn, spec.mask_fn is not None, "a mask_fn"),
            (self.grouped_heads, problem.H != problem.K, f"{problem.H} heads on {problem.K}"),
            (self.positions, problem.positions, "positions given as data"),
            (self.segments, problem.segments, "segments"),
            (self.lse, problem.lse, "the log-sum-exp"),
        ):
            if asked and not served:
                yield f"{what}: it serves none"
        for what, block in (("block_q", spec.block_q), ("block_kv", spec.block_kv)):
            if block is not None and self.block_multiple is None:
                yield f"{what} {block}: it chooses its own"
            elif block is not None and block % (self.block_multiple or 1):
                yield f"{what} {block}: it takes multiples of {self.block_multiple}"
        if self.square and problem.T != problem.S:
            yield f"{problem.T} queries and {problem.S} keys: it takes as many"
        longest = max(problem.T, problem.S)
        if self.max_tokens is not None and longest > self.max_tokens:
            yield f"{longest} tokens: it takes {self.max_tokens} at most"
