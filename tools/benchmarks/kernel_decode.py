"""Decoding cases of the kernel benchmark: one token a row over a long paged cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernel_cases import Candidate, Case
from kernel_oracle import relative

from memtrain_kernels import paged_attention, quantize_pages
from memtrain_kernels.decode.backends import BACKENDS, resolve_backend


def cases(device: jax.Device, *, quick: bool) -> Iterator[Case]:
    on_cpu = device.platform == "cpu"
    B, tokens, H, K, D = (2, 512, 4, 2, 64) if quick else (4, 32_768, 32, 8, 128)
    if not on_cpu and not quick:
        B = 16
    page = 16 if on_cpu else 128
    rng = np.random.default_rng(0)
    per_row = tokens // page
    pages = rng.standard_normal((2, B * per_row, page, K, D), np.float32)
    tables = rng.permutation(B * per_row).reshape(B, per_row).astype(np.int32)
    lengths = np.full(B, tokens, np.int32) - np.arange(B, dtype=np.int32)
    q = rng.standard_normal((B, 1, H, D), np.float32)
    kinds = ["float32"] if on_cpu else ["bfloat16"]
    for kind in (*kinds, "int8", "float8_e4m3fn"):
        yield _case(kind, q, pages, tables, lengths, kinds[0])


def _case(kind: str, q_np, pages_np, tables, lengths, compute: str) -> Case:
    q = jnp.asarray(q_np, compute)
    k, v = (jnp.asarray(x, compute) for x in pages_np)
    scales: dict[str, Any] = {}
    if kind != compute:
        (k, k_scales), (v, v_scales) = (quantize_pages(x, kind) for x in (k, v))
        scales = {"k_scales": k_scales, "v_scales": v_scales}
    arrays = (q, k, v, jnp.asarray(tables), jnp.asarray(lengths))
    B, _, H, D = q.shape
    num_bytes = int(lengths.sum()) * k.shape[2] * 2 * D * k.dtype.itemsize

    # The oracle reads what is stored: the last row, its last key head.
    b, head = B - 1, H - 1
    stored = [np.asarray(x[:, :, -1].astype(jnp.float32), np.float64) for x in (k, v)]
    if scales:
        for x, scale in zip(stored, scales.values(), strict=True):
            x *= np.asarray(scale, np.float64)[..., -1].reshape(-1, *(1,) * (x.ndim - 1))
    seen = [x[tables[b]].reshape(-1, D)[: lengths[b]] for x in stored]
    scores = seen[0] @ np.asarray(q[b, 0, head].astype(jnp.float32), np.float64) * D**-0.5
    p = np.exp(scores - scores.max())
    expected = (p / p.sum()) @ seen[1]

    def compiled(function: Callable[..., Any]) -> Callable[[], Any]:
        run = jax.jit(function).lower(*arrays).compile()
        return lambda: jax.block_until_ready(run(*arrays))

    def ours(name: str) -> Candidate:
        return lambda: compiled(lambda *a: paged_attention(*a, **scales, backend=name))

    def gathered(q, k, v, tables, lengths):
        """What one would write without a paged kernel: gather the cache, then jax.nn."""
        k, v = (x[tables].reshape(B, -1, *x.shape[2:]) for x in (k, v))
        if scales:
            k, v = (
                x.astype(q.dtype) * jnp.broadcast_to(s, (1, s.shape[-1]))[None, :, :, None]
                for x, s in zip((k, v), scales.values(), strict=True)
            )
        return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)

    names = list(dict.fromkeys([resolve_backend()[0], "xla", *BACKENDS]))
    names.remove("reference")
    candidates: dict[str, Candidate] = {f"memtrain {name}": ours(name) for name in names}
    candidates["gather + jax.nn"] = lambda: compiled(gathered)
    return Case(
        name=f"decode {kind} pages",
        about=f"B={B} tokens={int(lengths.max())} H={H} K={k.shape[2]} D={D} page={k.shape[1]}",
        work=num_bytes,
        rate="GB/s",
        ceiling="copy",
        candidates=candidates,
        error=lambda out: relative(np.asarray(out[b, 0, head], np.float32), expected),
        tolerance=1e-4 if compute == "float32" else 2e-2,
        parameters={"pages": kind, "bytes": num_bytes},
        ours=(f"memtrain {resolve_backend()[0]}", "memtrain xla"),
    )
