"""Attention cases of the kernel benchmark, and its rivals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernel_cases import FLOP_RATE, Candidate, Case
from kernel_oracle import Mask, attention_gradients, attention_rows, relative

from memtrain_kernels import BACKENDS, AttentionSpec, attention, explain, resolve_backend


@dataclass(frozen=True)
class Shape:
    """B rows of T tokens, H query heads on K key heads of `dim`; documents packed in a row."""

    name: str
    B: int
    T: int
    H: int
    K: int
    dim: int
    dtype: str
    causal: bool = True
    window: int | None = None
    documents: int = 1
    backward: bool = True
    checks_keys: bool = True


def _shapes(platform: str, quick: bool) -> list[Shape]:
    if platform == "cpu":
        T = 512 if quick else 4096
        return [
            Shape("causal", 1, T, 4, 4, 64, "float32"),
            Shape("window", 1, T, 4, 4, 64, "float32", window=T // 8),
            Shape("packed", 1, T, 4, 4, 64, "float32", documents=8),
            Shape("grouped", 1, T, 8, 2, 64, "float32"),
        ]
    T, B, H = (1024, 1, 2) if quick else (16_384, 1, 16)
    long = 2048 if quick else 32_768
    shapes = [
        Shape("causal D=128", B, T, H, H, 128, "bfloat16"),
        Shape("full D=128", B, T, H, H, 128, "bfloat16", causal=False),
        Shape("causal D=64", B, T, 2 * H, 2 * H, 64, "bfloat16"),
        Shape("causal D=256", B, T, max(H // 2, 1), max(H // 2, 1), 256, "bfloat16"),
        Shape("grouped D=128", B, T, H, max(H // 4, 1), 128, "bfloat16"),
        Shape("packed D=128", B, long, H, H, 128, "bfloat16", documents=8),
        Shape("window D=128", B, long, H, H, 128, "bfloat16", window=long // 8),
    ]
    if not quick:
        million = Shape("million D=128", 1, 2**20, 1, 1, 128, "bfloat16", checks_keys=False)
        shapes.append(million)
    return shapes


def cases(device: jax.Device, *, quick: bool) -> Iterator[Case]:
    for shape in _shapes(device.platform, quick):
        yield _case(shape, quick, backward=False)
        if shape.backward:
            yield _case(shape, quick, backward=True)


def _case(shape: Shape, quick: bool, *, backward: bool) -> Case:
    s = shape
    rng = np.random.default_rng(0)
    draw = lambda heads: rng.standard_normal((s.B, s.T, heads, s.dim), np.float32)  # noqa: E731
    # Rounded once, so that the oracle reads what the candidates read.
    q, k, v, d_out = (np.asarray(jnp.asarray(draw(h), s.dtype)) for h in (s.H, s.K, s.K, s.H))
    segments = np.arange(s.T) * s.documents // s.T if s.documents > 1 else None
    mask = Mask(s.causal, s.window, segments)
    spec = AttentionSpec(causal=s.causal, window=s.window)
    # What counts is the pairs that are seen, whatever a candidate computes besides.
    pairs = _visible_pairs(s)
    products = 7 if backward else 2
    inputs = [jnp.asarray(x) for x in (q, k, v, d_out)]
    rows = np.unique(np.concatenate([[0, s.T - 1], rng.integers(0, s.T, 6 if quick else 30)]))
    last = s.H - 1

    def error(result: Any) -> float:
        of = lambda x, head: np.asarray(x[0, :, head], np.float32)  # noqa: E731
        kv_head = last // (s.H // s.K)
        head = of(q, last), of(k, kv_head), of(v, kv_head)
        if not backward:
            expected, _ = attention_rows(*head, mask, rows)
            return relative(of(result, last)[rows], expected)
        if s.H != s.K or not s.checks_keys:
            # Keys gather from the heads of their group: only query gradients are a head's own.
            expected = _query_gradients(*head, of(d_out, last), mask, rows)
            return relative(of(result[0], last)[rows], expected)
        expected = attention_gradients(*head, of(d_out, last), mask, rows)
        return max(
            relative(of(ours, last)[rows], theirs)
            for ours, theirs in zip(result, expected, strict=True)
        )

    candidates: dict[str, Candidate] = {}
    names = [_default(inputs, spec, segments)]
    names += [
        name
        for name in BACKENDS
        if name not in (*names, "reference") and _serves(name, inputs, spec, segments)
    ]
    for name in names:
        candidates[f"memtrain {name}"] = _ours(name, spec, segments, inputs, backward)
    candidates |= _rivals(s, inputs, segments, backward)
    what = "forward+backward" if backward else "forward"
    return Case(
        name=f"attention {s.name} {what}",
        about=f"B={s.B} T={s.T} H={s.H} K={s.K} D={s.dim} {s.dtype}"
        + (f" window={s.window}" if s.window else "")
        + (f" documents={s.documents}" if s.documents > 1 else ""),
        work=products * 2.0 * s.B * s.H * s.dim * pairs,
        rate=FLOP_RATE,
        ceiling=s.dtype,
        candidates=candidates,
        error=error,
        tolerance=1e-4 if s.dtype == "float32" else 2e-2,
        parameters=vars(s) | {"visible_pairs": pairs, "products": products},
        notes=lambda: _explained(inputs, spec, segments),
        ours=tuple(f"memtrain {name}" for name in names if _serves(name, inputs, spec, segments)),
    )


def _visible_pairs(s: Shape) -> float:
    """Pairs of a query and a key that it sees, in one row and head."""
    length = s.T // s.documents
    if not s.causal:
        return float(s.T * length)
    window = min(s.window or length, length)
    one = window * (window + 1) / 2 + (length - window) * window
    return s.documents * one


def _query_gradients(q, k, v, d_out, mask: Mask, rows: np.ndarray) -> np.ndarray:
    q, k, v, d_out = (x.astype(np.float64) for x in (q, k, v, d_out))
    scale = q.shape[-1] ** -0.5
    scores = q[rows] @ k.T * scale
    scores[~mask.seen(rows, np.arange(len(k)))] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = d_out[rows] @ v.T
    return (p * (dp - np.sum(p * dp, axis=-1, keepdims=True))) @ k * scale


def _tokens(segments: np.ndarray | None) -> dict[str, Any]:
    if segments is None:
        return {}
    segments = segments.astype(np.int32)
    return {"q_segments": segments, "kv_segments": segments}


def _default(inputs, spec, segments) -> str:
    from memtrain_kernels.attention import Problem

    q, k, v, _ = inputs
    return resolve_backend(None, Problem.of(q, k, v, spec, segments=segments is not None))[0]


def _serves(name: str, inputs, spec, segments) -> bool:
    q, k, v, _ = inputs
    try:
        explain(q, k, v, spec=spec, backend=name, **_tokens(segments))
    except ValueError:
        return False
    return True


def _explained(inputs, spec, segments) -> dict[str, Any]:
    q, k, v, _ = inputs
    found = explain(q, k, v, spec=spec, **_tokens(segments))
    return {"choice": found.backend, "reason": found.reason, "skipped": found.skipped_share}


def _jax_call(function: Callable[..., Any], inputs, backward: bool) -> Callable[[], Any]:
    """Compiles function(q, k, v) -> out; the call gives out, or the three gradients."""
    q, k, v, d_out = inputs

    def gradients(q, k, v, d_out):
        _, pullback = jax.vjp(function, q, k, v)
        return pullback(d_out)

    if backward:
        compiled = jax.jit(gradients).lower(q, k, v, d_out).compile()
        return lambda: jax.block_until_ready(compiled(q, k, v, d_out))
    compiled = jax.jit(function).lower(q, k, v).compile()
    return lambda: jax.block_until_ready(compiled(q, k, v))


def _ours(name: str, spec: AttentionSpec, segments, inputs, backward: bool) -> Candidate:
    def build() -> Callable[[], Any]:
        def run(q, k, v):
            return attention(q, k, v, spec=spec, backend=name, **_tokens(segments))

        return _jax_call(run, inputs, backward)

    return build


def _rivals(s: Shape, inputs, segments, backward: bool) -> dict[str, Candidate]:
    found: dict[str, Candidate] = {}
    platform = jax.default_backend()
    dense_fits = s.T <= 20_000
    window = None if s.window is None else (s.window - 1, 0)
    for implementation in ("xla", "cudnn") if platform == "gpu" else ("xla",):
        if implementation == "xla" and not dense_fits:
            continue

        def build(implementation=implementation):
            dense = None
            if segments is not None:
                dense = jnp.asarray(segments[:, None] == segments[None])[None, None]

            def run(q, k, v):
                return jax.nn.dot_product_attention(
                    q,
                    k,
                    v,
                    is_causal=s.causal,
                    local_window_size=window,
                    mask=dense,
                    implementation=implementation,
                )

            return _jax_call(run, inputs, backward)

        found[f"jax.nn {implementation}"] = build
    if platform == "cpu":
        found["torch SDPA"] = lambda: _torch(s, inputs, segments, backward)
    if platform == "gpu":
        found["jax attention_mgpu"] = lambda: _jax_mosaic_gpu(s, inputs, backward)
    if platform == "tpu":
        found["jax splash"] = lambda: _jax_splash(s, inputs, segments, backward)
    if platform != "cpu":
        found["tokamax"] = lambda: _tokamax(s, inputs, segments, backward)
    return found


def _torch(s: Shape, inputs, segments, backward: bool) -> Callable[[], Any]:
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.functional import (  # pyright: ignore[reportMissingImports]
        scaled_dot_product_attention,
    )

    q, k, v, d_out = (
        torch.from_numpy(np.asarray(x, np.float32).copy()).transpose(1, 2) for x in inputs
    )
    dense = None
    if s.window is not None or segments is not None:
        seen = Mask(s.causal, s.window, segments).seen(np.arange(s.T), np.arange(s.T))
        dense = torch.from_numpy(seen)
    arguments = {
        "attn_mask": dense,
        "is_causal": s.causal and dense is None,
        "enable_gqa": s.H != s.K,
    }

    def forward():
        with torch.no_grad():
            out = scaled_dot_product_attention(q, k, v, **arguments)
        return out.transpose(1, 2).numpy()

    def both():
        for x in (q, k, v):
            x.requires_grad_(True)
            x.grad = None
        scaled_dot_product_attention(q, k, v, **arguments).backward(d_out)
        return [x.grad.transpose(1, 2).numpy() for x in (q, k, v)]

    return both if backward else forward


def _jax_mosaic_gpu(s: Shape, inputs, backward: bool) -> Callable[[], Any]:
    """JAX's own sample kernel for Hopper, in its own best configuration."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu as mgpu

    if s.window is not None or s.documents > 1:
        raise ValueError("it knows no windows and no packed documents")
    if backward and s.causal:
        raise ValueError("its backward pass knows no causal mask")
    config = mgpu.TuningConfig(
        block_q=64,
        block_kv=128 if s.dim <= 128 else 64,
        max_concurrent_steps=2,
        causal=s.causal,
        **(
            {
                "block_q_dkv": 64,
                "block_kv_dkv": 64,
                "block_q_dq": 64,
                "block_kv_dq": 64,
            }
            if backward
            else {}
        ),
    )

    def run(q, k, v):
        return mgpu.attention(q * s.dim**-0.5, k, v, config)

    return _jax_call(run, inputs, backward)


def _jax_splash(s: Shape, inputs, segments, backward: bool) -> Callable[[], Any]:
    """JAX's splash attention for TPU."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    if s.window is not None:
        one = masks.LocalMask((s.T, s.T), (s.window - 1, 0), 0)
    elif s.causal:
        one = masks.CausalMask((s.T, s.T))
    else:
        one = masks.FullMask((s.T, s.T))
    make = kernel.make_splash_mqa if s.H != s.K else kernel.make_splash_mha
    attend = make(
        masks.MultiHeadMask([one] * (s.H // s.K if s.H != s.K else s.H)),
        head_shards=1,
        q_seq_shards=1,
    )
    ids = None
    if segments is not None:
        ids = kernel.SegmentIds(jnp.asarray(segments), jnp.asarray(segments))

    def run(q, k, v):
        q, k, v = (x.swapaxes(1, 2) for x in (q * s.dim**-0.5, k, v))
        one_row = lambda q, k, v: attend(q, k, v, segment_ids=ids)  # noqa: E731
        if s.H != s.K:
            q = q.reshape(s.B, s.K, s.H // s.K, s.T, s.dim)
            out = jax.vmap(jax.vmap(one_row))(q, k, v).reshape(s.B, s.H, s.T, s.dim)
        else:
            out = jax.vmap(one_row)(q, k, v)
        return out.swapaxes(1, 2)

    return _jax_call(run, inputs, backward)


def _tokamax(s: Shape, inputs, segments, backward: bool) -> Callable[[], Any]:
    import tokamax  # pyright: ignore[reportMissingImports]

    if segments is not None:
        raise ValueError("it takes packed documents as a dense mask only")

    def run(q, k, v):
        window = {} if s.window is None else {"local_window_size": (s.window - 1, 0)}
        return tokamax.dot_product_attention(q, k, v, is_causal=s.causal, **window)

    return _jax_call(run, inputs, backward)
