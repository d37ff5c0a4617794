"""The self-check of a backend on the user's own device: its numbers beside those of "xla".

A kernel whose numbers were never compared on a kind of device may compile there and be wrong. Small
shapes, forward and backward: plain over several of the backend's own tiles, and in small tiles with
a window, sinks, a prefix, a soft cap and packed documents. Once per device kind, software version
and source of the kernel, and remembered in the user's cache folder.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np

from memtrain_kernels.attention.capabilities import Problem
from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.target import Target


TOLERANCE = {"float32": 2e-3, "bfloat16": 3e-2, "float16": 1e-2}
"""Of a row's greatest magnitude: both compute in float32, but round operands at other places."""
LSE_TOLERANCE = 5e-3
"""Of the log-sum-exp, absolute: it is float32 in both."""
_TOKENS, _HEADS, _KV_HEADS = 454, 4, 2
_PLAIN_TOKENS = 2500


@dataclass(frozen=True)
class SelfCheck:
    passed: bool
    line: str


def self_check(name: str, target: Target, problem: Problem | None = None) -> SelfCheck:
    """Whether a backend reproduces "xla" here; from the cache where it was found out before.

    problem: its head_dim, value_dim and dtype are those of the check. Also while a program is
    traced. In a job of several processes a failure raises RuntimeError: processes that chose
    differently would wait for each other for ever.
    """
    kind = ("bfloat16", 128, 128)
    if problem is not None:
        kind = (problem.dtype, problem.head_dim, problem.value_dim)
    result = _checked(name, target, *kind)
    if not result.passed and jax.process_count() > 1:
        raise RuntimeError(f"{result.line}; set MEMTRAIN_ATTENTION_BACKEND=xla for the whole job")
    return result


@functools.cache
def _checked(name: str, target: Target, dtype: str, head_dim: int, value_dim: int) -> SelfCheck:
    software = f"jax {jax.__version__} {jaxlib.version.__version__} {_driver()}"
    key = f"{name} {target.device_kind} {dtype} {head_dim} {value_dim} {software} {_digest(name)}"
    known = _read_cache().get(key)
    if isinstance(known, dict) and set(known) == {"passed", "line"}:
        line = f"{known['line']} (found out before: {cache_file()})"
        return SelfCheck(bool(known["passed"]), line)
    where = f"self-check of {name!r} ({dtype}, head_dim {head_dim}) on {target.device_kind}"
    try:
        # A thread of its own: the caller may be tracing, and traces belong to threads.
        error = _in_thread(lambda: greatest_error(name, dtype, head_dim, value_dim))
    except Exception as problem:  # whatever a compiler or a driver may raise; next time it may not
        first = (str(problem).splitlines() or [""])[0]
        return SelfCheck(False, f"{where} failed: {type(problem).__name__}: {first}")
    if error <= 1:
        result = SelfCheck(True, f"{where} passed: {error:.0%} of the tolerance")
    else:
        result = SelfCheck(False, f"{where} failed: off by {error:.1f} times the tolerance")
    _remember(key, result)
    return result


def greatest_error(name: str, dtype: str, head_dim: int, value_dim: int) -> float:
    """The greatest difference from "xla" of output, log-sum-exp and gradients, as a share of what
    is allowed, over those calls that the backend serves."""
    from memtrain_kernels.attention.backends import backend_module, capabilities

    table = capabilities(name)
    blocks: dict[str, Any] = {}
    if (table.block_multiple or 1) > 1:  # several tiles of the smallest size, and a ragged end
        blocks = {"block_q": table.block_multiple, "block_kv": table.block_multiple}
    rich = AttentionSpec(window=100, sink_tokens=3, soft_cap=2.0, **blocks)
    errors: list[float] = []
    for spec, tokens, is_packed in (
        (AttentionSpec(), _PLAIN_TOKENS, False),
        (AttentionSpec(causal=False, window=(70, 50), **blocks), _TOKENS, False),
        (AttentionSpec(window=100, prefix=150, **blocks), _TOKENS, False),
        (rich, _TOKENS, True),
    ):
        heads = 1 if tokens == _PLAIN_TOKENS else _HEADS
        kv_heads = min(heads, _KV_HEADS) if table.grouped_heads else heads
        (q, k, v), cotangents = _inputs(tokens, heads, kv_heads, head_dim, value_dim, dtype)
        problem = Problem.of(q, k, v, spec, positions=is_packed, segments=is_packed, lse=table.lse)
        if table.refusal(problem) is not None:
            continue
        if not table.lse:
            cotangents = cotangents[0], jnp.zeros_like(cotangents[1])
        documents = _documents(tokens) if is_packed else (None,) * 4
        results = []
        for backend in (name, "xla"):
            attend = functools.partial(_attend, backend_module(backend).attend, documents, spec)
            results.append(
                jax.device_get(jax.jit(functools.partial(_both, attend))(q, k, v, cotangents))
            )
        (o, lse, *gradients), (o_x, lse_x, *gradients_x) = results
        pairs = zip((o, *gradients), (o_x, *gradients_x), strict=True)
        errors += [_relative(a, b) / TOLERANCE[dtype] for a, b in pairs]
        if table.lse:
            errors.append(_finite(np.abs(lse - lse_x).max()) / LSE_TOLERANCE)
    if not errors:
        raise ValueError("it serves none of the calls of the check")
    return max(errors)


def _inputs(tokens: int, heads: int, kv_heads: int, head_dim: int, value_dim: int, dtype: str):
    """q, k, v, and the cotangents of output and log-sum-exp."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal((1, tokens, *shape)), dtype)  # noqa: E731
    arrays = draw(heads, head_dim), draw(kv_heads, head_dim), draw(kv_heads, value_dim)
    d_out, d_lse = draw(heads, value_dim), draw(heads)
    return arrays, (d_out.astype(jnp.float32), d_lse.astype(jnp.float32))


def _documents(tokens: int) -> tuple[jax.Array, ...]:
    """Positions and segments of two documents in a row."""
    index, second = np.arange(tokens), 150
    segments = jnp.asarray((index >= second).astype(np.int32)[None])
    positions = jnp.asarray(np.where(index >= second, index - second, index).astype(np.int32)[None])
    return positions, positions, segments, segments


def _attend(attend: Callable[..., Any], tokens, spec, q, k, v) -> tuple[jax.Array, jax.Array]:
    o, lse = attend(q, k, v, *tokens, spec)
    return o.astype(jnp.float32), lse


def _both(attend: Callable[..., Any], q, k, v, cotangents) -> tuple[jax.Array, ...]:
    """Output, log-sum-exp, and the gradients of q, k and v."""
    (o, lse), pullback = jax.vjp(attend, q, k, v)
    return o, lse, *pullback(cotangents)


def _relative(a: Any, b: Any) -> float:
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    # Row by row: the late rows of a long causal call are small, and an error in them is no less.
    rows = np.abs(b).max(-1)
    size = np.maximum(rows, max(float(np.median(rows)), 1e-6))
    return _finite((np.abs(a - b).max(-1) / size).max())


def _finite(difference: Any) -> float:
    return float(difference) if np.isfinite(difference) else float("inf")


def _in_thread(act: Callable[[], float]) -> float:
    found: list[float] = []
    failed: list[BaseException] = []

    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]

    def run() -> None:
        try:
            # What the caller made strict for its own program is no matter of this one.
            with (
                jax.default_device(device),
                jax.transfer_guard("allow"),
                jax.numpy_dtype_promotion("standard"),
                jax.numpy_rank_promotion("allow"),
            ):
                found.append(act())
        except BaseException as error:  # handed to the caller
            failed.append(error)

    thread = threading.Thread(target=run, name="attention-self-check")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


def _driver() -> str:
    """The version of what runs the programs: libtpu, CUDA."""
    return " ".join(jax.local_devices()[0].client.platform_version.split())


def _digest(name: str) -> str:
    """Of the sources of the kernels: a changed kernel is checked anew."""
    folder, digest = Path(__file__).parent, hashlib.sha256()
    for file in sorted([*folder.glob("*.py"), *folder.glob(f"{name}/*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def cache_file() -> Path | None:
    """Where results are remembered: MEMTRAIN_CACHE, else the user's cache folder; None if "off"."""
    folder = os.environ.get("MEMTRAIN_CACHE")
    if folder:
        return None if folder == "off" else Path(folder) / "self_checks.json"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "memtrain" / "self_checks.json"


def _read_cache() -> dict[str, Any]:
    file = cache_file()
    if file is None:
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(key: str, result: SelfCheck) -> None:
    """A cache that cannot be written costs a check at the next start and nothing else."""
    file = cache_file()
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(_read_cache() | {key: asdict(result)}, indent=1)
        with tempfile.NamedTemporaryFile(
            "w", dir=file.parent, delete=False, encoding="utf-8"
        ) as new:
            new.write(content)
        os.replace(new.name, file)
    except OSError:
        pass
