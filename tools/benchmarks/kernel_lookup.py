"""Lookup cases of the kernel benchmark: exact top-k over many keys, and the embedding bag."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernel_cases import FLOP_RATE, Candidate, Case
from kernel_oracle import relative

from memtrain_kernels import (
    memory_topk,
    product_key_topk,
    weighted_gather,
    weighted_gather_row_gradients,
)


def cases(device: jax.Device, *, quick: bool) -> Iterator[Case]:
    on_cpu = device.platform == "cpu"
    yield _topk(quick, on_cpu)
    yield _product_keys(quick, on_cpu)
    for backward in (False, True):
        yield _bag(quick, on_cpu, backward)


def _compiled(function: Callable[..., Any], *arrays: jax.Array) -> Callable[[], Any]:
    run = jax.jit(function).lower(*arrays).compile()
    return lambda: jax.block_until_ready(run(*arrays))


def _topk(quick: bool, on_cpu: bool) -> Case:
    M, S, D, k = (8, 4096, 32, 8) if quick else (64 if on_cpu else 1024, 2**20, 64, 32)
    dtype = "float32" if on_cpu else "bfloat16"
    rng = np.random.default_rng(0)
    queries, keys = (jnp.asarray(rng.standard_normal((n, D), np.float32), dtype) for n in (M, S))
    row = np.asarray(queries[-1], np.float64) @ np.asarray(keys, np.float64).T
    expected = np.sort(row)[::-1][:k]

    def dense(queries, keys):
        scores = jnp.matmul(queries, keys.T, preferred_element_type=jnp.float32)
        return jax.lax.top_k(scores, k)

    def torch_topk() -> Callable[[], Any]:
        import torch  # pyright: ignore[reportMissingImports]

        q, x = (torch.from_numpy(np.array(a, np.float32)) for a in (queries, keys))
        return lambda: [a.numpy() for a in torch.topk(q @ x.T, k)]

    candidates: dict[str, Candidate] = {
        "memtrain memory_topk": lambda: _compiled(lambda q, x: memory_topk(q, x, k), queries, keys),
        "lax.top_k of all scores": lambda: _compiled(dense, queries, keys),
        "lax.approx_max_k": lambda: _compiled(
            lambda q, x: jax.lax.approx_max_k(
                jnp.matmul(q, x.T, preferred_element_type=jnp.float32), k, recall_target=0.999
            ),
            queries,
            keys,
        ),
    }
    if on_cpu:
        candidates["torch.topk"] = torch_topk
    return Case(
        name="lookup top-k",
        about=f"{M} queries, {S:,} keys, D={D}, k={k}, {dtype}",
        work=2.0 * M * S * D,
        rate=FLOP_RATE,
        ceiling=dtype,
        candidates=candidates,
        error=lambda result: relative(result[0][-1], expected),
        tolerance=1e-5 if on_cpu else 1e-2,
        parameters={"queries": M, "keys": S, "dim": D, "k": k},
        ours=("memtrain memory_topk",),
    )


def _product_keys(quick: bool, on_cpu: bool) -> Case:
    M, N, k = (64, 64, 8) if quick else (4096 if on_cpu else 65_536, 1024, 32)
    rng = np.random.default_rng(0)
    halves = [jnp.asarray(rng.standard_normal((M, N), np.float32)) for _ in range(2)]
    one, two = (np.asarray(x[-1], np.float64) for x in halves)
    expected = np.sort((one[:, None] + two[None]).ravel())[::-1][:k]

    def plain(one, two):
        (a, i), (b, j) = jax.lax.top_k(one, k), jax.lax.top_k(two, k)
        best, pair = jax.lax.top_k((a[:, :, None] + b[:, None]).reshape(M, k * k), k)
        return best, jnp.take_along_axis(i, pair // k, 1) * N + jnp.take_along_axis(j, pair % k, 1)

    return Case(
        name="lookup product keys",
        about=f"{M:,} queries, {N:,} x {N:,} slots, k={k}",
        work=2.0 * M * N * 4,
        rate="GB/s",
        ceiling="copy",
        candidates={
            "memtrain product_key_topk": lambda: _compiled(
                lambda a, b: product_key_topk(a, b, k), *halves
            ),
            "lax.top_k": lambda: _compiled(plain, *halves),
        },
        error=lambda result: relative(result[0][-1], expected),
        tolerance=1e-5,
        parameters={"queries": M, "half_keys": N, "k": k},
        ours=("memtrain product_key_topk",),
    )


def _bag(quick: bool, on_cpu: bool, backward: bool) -> Case:
    N, D, M, K = (256, 32, 64, 4) if quick else (2**16, 256, 4096, 32)
    if not on_cpu and not quick:
        N, M = 2**20, 32_768
    dtype = "float32" if on_cpu else "bfloat16"
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.standard_normal((N, D), np.float32), dtype)
    # A few slots are read far more often than the rest, as trained memories do.
    slots = jnp.asarray(((rng.random((M, K)) ** 3) * N).astype(np.int32))
    weights = jnp.asarray(rng.random((M, K)).astype(np.float32))
    dy = jnp.asarray(rng.standard_normal((M, D), np.float32), dtype)
    slot = int(slots[-1, -1])
    rows, places = np.nonzero(np.asarray(slots) == slot)
    w, dy_np = np.asarray(weights, np.float64), np.asarray(dy.astype(jnp.float32), np.float64)
    expected_row = (w[rows, places][:, None] * dy_np[rows]).sum(0)
    t_rows = np.asarray(table[slots[-1]].astype(jnp.float32), np.float64)
    expected_out = (w[-1][:, None] * t_rows).sum(0)

    def plain(table, slots, weights):
        return jnp.einsum("mk,mkd->md", weights.astype(table.dtype), table[slots])

    def gradient(function):
        def run(table, slots, weights, dy):
            return jax.vjp(lambda t: function(t, slots, weights), table)[1](dy)[0]

        return run

    def row_gradients(table, slots, weights, dy):
        return weighted_gather_row_gradients(slots, weights, dy)

    def torch_bag() -> Callable[[], Any]:
        import torch  # pyright: ignore[reportMissingImports]
        from torch.nn.functional import embedding_bag  # pyright: ignore[reportMissingImports]

        t = torch.from_numpy(np.array(table, np.float32)).requires_grad_(backward)
        i = torch.from_numpy(np.array(slots, np.int64))
        x, d = torch.from_numpy(np.array(weights)), torch.from_numpy(np.array(dy, np.float32))

        def call():
            out = embedding_bag(i, t, mode="sum", per_sample_weights=x)
            if not backward:
                return out.numpy()
            t.grad = None
            out.backward(d)
            return t.grad.numpy()

        return call

    arrays = (table, slots, weights)
    if backward:
        candidates: dict[str, Candidate] = {
            "memtrain weighted_gather": lambda: _compiled(gradient(weighted_gather), *arrays, dy),
            "memtrain row gradients": lambda: _compiled(row_gradients, *arrays, dy),
            "jax gather + einsum": lambda: _compiled(gradient(plain), *arrays, dy),
        }
    else:
        candidates = {
            "memtrain weighted_gather": lambda: _compiled(weighted_gather, *arrays),
            "jax gather + einsum": lambda: _compiled(plain, *arrays),
        }
    if on_cpu:
        candidates["torch embedding_bag"] = torch_bag

    def error(result: Any) -> float:
        if not backward:
            return relative(np.asarray(result[-1], np.float32), expected_out)
        if hasattr(result, "ids"):
            at = int(np.searchsorted(np.asarray(result.ids), slot))
            return relative(np.asarray(result.rows[at], np.float32), expected_row)
        return relative(np.asarray(result[slot], np.float32), expected_row)

    return Case(
        name=f"lookup embedding bag {'table gradient' if backward else 'forward'}",
        about=f"table {N:,} x {D} {dtype}, {M:,} bags of {K}",
        # Rows that are read; and rows of dy that are read for each of them, and added to a row.
        work=float(M) * K * D * table.dtype.itemsize * (2 if backward else 1),
        rate="GB/s",
        ceiling="copy",
        candidates=candidates,
        error=error,
        tolerance=1e-5 if on_cpu else 2e-2,
        parameters={"rows": N, "dim": D, "bags": M, "bag": K},
        ours=tuple(name for name in candidates if name.startswith("memtrain")),
    )
