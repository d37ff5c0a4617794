"""The self-check of a backend on the user's own device: its numbers beside those of "xla".

A kernel whose numbers were never compared on a kind of device may compile there and be wrong. Small
shapes, forward and backward, with a window, sinks and packed documents; once per device kind, jax
version and source of the kernel, and remembered in the user's cache folder.
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
import numpy as np

from memtrain_kernels.attention.capabilities import Problem
from memtrain_kernels.attention.spec import AttentionSpec
from memtrain_kernels.target import Target


TOLERANCE = {"float32": 2e-3, "bfloat16": 3e-2, "float16": 1e-2}
"""Of the greatest magnitude: both compute in float32, but round their operands at other places."""
_TOKENS, _HEADS, _KV_HEADS = 384, 4, 2


@dataclass(frozen=True)
class SelfCheck:
    passed: bool
    line: str


def self_check(name: str, target: Target, *, head_dim: int, dtype: str) -> SelfCheck:
    """Whether a backend reproduces "xla" here; from the cache where it was found out before.

    Also while a program is traced. In a job of several processes a failure raises RuntimeError:
    processes that chose differently would wait for each other for ever.
    """
    result = _checked(name, target, head_dim, dtype)
    if not result.passed and jax.process_count() > 1:
        raise RuntimeError(f"{result.line}; set MEMTRAIN_ATTENTION_BACKEND=xla for the whole job")
    return result


@functools.cache
def _checked(name: str, target: Target, head_dim: int, dtype: str) -> SelfCheck:
    key = f"{name} {target.device_kind} {head_dim} {dtype} jax {jax.__version__} {_digest(name)}"
    known = _read_cache().get(key)
    if isinstance(known, dict) and set(known) == {"passed", "line"}:
        return SelfCheck(bool(known["passed"]), f"{known['line']} (found out before)")
    result = _run(name, target, head_dim, dtype)
    _remember(key, result)
    return result


def _run(name: str, target: Target, head_dim: int, dtype: str) -> SelfCheck:
    where = f"self-check of {name!r} ({dtype}, head_dim {head_dim}) on {target.device_kind}"
    try:
        # A thread of its own: the caller may be tracing, and traces belong to threads.
        error = _in_thread(lambda: greatest_error(name, head_dim, dtype))
    except Exception as problem:  # whatever a compiler or a driver may raise
        first = (str(problem).splitlines() or [""])[0]
        return SelfCheck(False, f"{where} failed: {type(problem).__name__}: {first}")
    bound = TOLERANCE[dtype]
    if not error <= bound:
        return SelfCheck(False, f"{where} failed: off by {error:.1e}, {bound:.0e} is allowed")
    return SelfCheck(True, f"{where} passed: within {error:.1e} of 'xla'")


def greatest_error(name: str, head_dim: int, dtype: str) -> float:
    """The greatest difference from "xla" of output, log-sum-exp and gradients, as a share of the
    greatest magnitude of each, over the specs that the backend serves."""
    from memtrain_kernels.attention.backends import backend_module, capabilities

    table = capabilities(name)
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    q = draw(1, _TOKENS, _HEADS, head_dim)
    kv_heads = _KV_HEADS if table.grouped_heads else _HEADS
    k, v = draw(1, _TOKENS, kv_heads, head_dim), draw(1, _TOKENS, kv_heads, head_dim)
    d_out = jnp.asarray(rng.standard_normal((1, _TOKENS, _HEADS, head_dim)), jnp.float32)
    d_lse = jnp.asarray(rng.standard_normal((1, _TOKENS, _HEADS)), jnp.float32)
    segments = jnp.asarray((np.arange(_TOKENS) >= 150).astype(np.int32)[None])
    index = np.arange(_TOKENS)
    positions = jnp.asarray(np.where(index >= 150, index - 150, index).astype(np.int32)[None])
    errors = []
    for spec, is_packed in (
        (AttentionSpec(), False),
        (AttentionSpec(causal=False), False),
        (AttentionSpec(window=100, sink_tokens=3, soft_cap=20.0), True),
    ):
        needs_lse = table.lse
        problem = Problem.of(q, k, v, spec, positions=is_packed, segments=is_packed, lse=needs_lse)
        if table.refusal(problem) is not None:
            continue
        tokens = (positions, positions, segments, segments) if is_packed else (None,) * 4
        cotangents = (d_out, d_lse if needs_lse else jnp.zeros_like(d_lse))
        results = []
        for backend in (name, "xla"):
            attend = functools.partial(_attend, backend_module(backend).attend, tokens, spec)
            found = jax.device_get(jax.jit(functools.partial(_both, attend))(q, k, v, cotangents))
            results.append(found if needs_lse else (found[0], *found[2:]))
        errors += [_relative(a, b) for a, b in zip(*results, strict=True)]
    if not errors:
        raise ValueError("it serves none of the calls of the check")
    return max(errors)


def _attend(attend: Callable[..., Any], tokens, spec, q, k, v) -> tuple[jax.Array, jax.Array]:
    o, lse = attend(q, k, v, *tokens, spec)
    return o.astype(jnp.float32), lse


def _both(attend: Callable[..., Any], q, k, v, cotangents) -> tuple[jax.Array, ...]:
    """Output, log-sum-exp, and the gradients of q, k and v."""
    (o, lse), pullback = jax.vjp(attend, q, k, v)
    return o, lse, *pullback(cotangents)


def _relative(a: Any, b: Any) -> float:
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    difference = np.abs(a - b).max() / max(np.abs(b).max(), 1e-6)
    return float(difference) if np.isfinite(difference) else float("inf")


def _in_thread(act: Callable[[], float]) -> float:
    found: list[float] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(act())
        except BaseException as error:  # handed to the caller
            failed.append(error)

    thread = threading.Thread(target=run, name="attention-self-check")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


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
