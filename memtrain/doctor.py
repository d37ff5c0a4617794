"""`memtrain doctor`: is this machine ready, and what to do where it is not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from memtrain import runtime
from memtrain.errors import BAD_INPUT, DONE


Status = Literal["ok", "note", "broken"]

_NEWEST_TESTED = {"jax": "0.12", "flax": "0.12", "orbax-checkpoint": "0.12"}
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "numpy")
_EXTRAS = {
    "cuda": ("jax_cuda13_plugin", "NVIDIA GPUs"),
    "tpu": ("libtpu", "TPUs"),
    "report": ("matplotlib", "plots in reports"),
    "tracking": ("tensorboardX", "TensorBoard"),
    "tokenizers": ("tokenizers", "Hugging Face tokenizers"),
    "arrayrecord": ("array_record", "ArrayRecord files"),
}
_MIN_FREE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Check:
    """One thing looked at. "note" is worth knowing; "broken" means that memtrain cannot be used."""

    name: str
    status: Status
    found: str
    advice: str = ""


def examine() -> dict[str, Any]:
    """Everything looked at, in order, whether it is usable, and the exit code: 0, or 2 if not.

    Takes two or three seconds, most of them for JAX to start.
    """
    checks = [*_software(), *_machine(), *_storage(), *_extras()]
    usable = all(check.status != "broken" for check in checks)
    if usable:
        runtime.prepare()
        checks += [_attempt("devices", _devices)]
        usable = checks[-1].status != "broken"
    if usable:
        checks += [_attempt("matmul", _matmul), _attempt("attention", _attention)]
        checks += [_attempt("kernels", _kernels)]
        usable = all(check.status != "broken" for check in checks)
    return {
        "usable": usable,
        "exit_code": DONE if usable else BAD_INPUT,
        "checks": [asdict(check) for check in checks],
    }


def as_lines(result: dict[str, Any]) -> str:
    """The result for people, a line per check, advice under it."""
    marks = {"ok": "  ", "note": "- ", "broken": "x "}
    width = max(len(check["name"]) for check in result["checks"])
    lines = []
    for check in result["checks"]:
        lines.append(f"{marks[check['status']]}{check['name']:<{width}}  {check['found']}")
        if check["advice"]:
            lines.append(f"  {'':<{width}}  -> {check['advice']}")
    broken = [check["name"] for check in result["checks"] if check["status"] == "broken"]
    verdict = "memtrain is ready" if result["usable"] else f"not usable yet: {', '.join(broken)}"
    return "\n".join([*lines, verdict])


def supported(version: str, specifier: str) -> bool:
    """Whether a version such as "0.12.0.1" meets a specifier such as ">=0.11.2,<0.13"."""
    have = _numbers(version)
    for clause in filter(None, specifier.split(",")):
        found = re.fullmatch(r"\s*(>=|<=|==|!=|<|>)\s*([\d.]+)\s*", clause)
        if found is None:
            raise ValueError(f"cannot read the version requirement {clause!r}")
        want = _numbers(found[2])
        length = max(len(have), len(want))
        a, b = (v + (0,) * (length - len(v)) for v in (have, want))
        met = {">=": a >= b, "<=": a <= b, "==": a == b, "!=": a != b, "<": a < b, ">": a > b}
        if not met[found[1]]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    """The release part: (0, 12, 1) of "0.12.1rc2+cpu"."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _requirements() -> dict[str, str]:
    """Version specifiers of our unconditional dependencies, as installed with us."""
    found = {}
    for line in importlib.metadata.requires("memtrain") or []:
        requirement, _, marker = line.partition(";")
        if "extra" not in marker and (parts := re.match(r"([\w.-]+)\s*(.*)", requirement.strip())):
            found[parts[1].lower()] = parts[2]
    return found


def _software() -> Iterator[Check]:
    yield Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    yield Check("memtrain", "ok", importlib.metadata.version("memtrain"))
    requirements = _requirements()
    for name in _PACKAGES:
        wanted = requirements.get(name, "")
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, "broken", "not installed", f"pip install '{name}{wanted}'")
            continue
        if not supported(version, wanted):
            advice = f"memtrain needs {wanted}: pip install '{name}{wanted}'"
            yield Check(name, "broken", version, advice)
            continue
        newest = _NEWEST_TESTED.get(name)
        if newest and _numbers(version)[:2] > _numbers(newest):
            advice = f"newer than {newest}, the newest that memtrain was tested with"
            yield Check(name, "note", version, advice)
        else:
            yield Check(name, "ok", version)


def _machine() -> Iterator[Check]:
    yield Check("cpu", "ok", f"{cpu_cores():g} cores of {os.cpu_count()}, {platform.machine()}")
    memory = memory_bytes()
    if memory is None:
        yield Check("memory", "note", "unknown on this system")
    elif memory < 4 * 2**30:
        advice = "the quickstart wants 4 GiB: lower train.batch_size if it is killed"
        yield Check("memory", "note", _gib(memory), advice)
    else:
        yield Check("memory", "ok", _gib(memory))


def _storage() -> Iterator[Check]:
    free = shutil.disk_usage(Path.cwd()).free
    if free < _MIN_FREE_BYTES:
        advice = f"checkpoints want more: free {_gib(_MIN_FREE_BYTES)} or use --run-dir elsewhere"
        yield Check("disk", "note", f"{_gib(free)} free here", advice)
    else:
        yield Check("disk", "ok", f"{_gib(free)} free here")
    folder = runtime.cache_folder()
    if folder is None:
        yield Check("cache", "note", "off (MEMTRAIN_CACHE=off)", "every start compiles anew")
    elif not _can_be_made(folder):
        advice = "every start compiles anew: set MEMTRAIN_CACHE to a folder that can be written"
        yield Check("cache", "note", f"{folder} cannot be written", advice)
    else:
        yield Check("cache", "ok", str(folder))


def _extras() -> Iterator[Check]:
    present = [name for name, (module, _) in _EXTRAS.items() if importlib.util.find_spec(module)]
    absent = {name: what for name, (_, what) in _EXTRAS.items() if name not in present}
    yield Check("extras", "ok", ", ".join(present) or "none")
    nodes = {"cuda": "nvidia[0-9]*", "tpu": "accel[0-9]*"}
    for name in absent:
        if name in nodes and next(Path("/dev").glob(nodes[name]), None):
            advice = f"pip install 'memtrain[{name}]' to use it"
            yield Check(name, "note", f"{absent[name]} seen, their support is absent", advice)


def _attempt(name: str, look: Callable[[], Check]) -> Check:
    """What `look` finds; if it raises, that."""
    try:
        return look()
    except Exception as error:
        first = str(error).strip().splitlines() or [""]
        advice = "reinstall into a new environment with tools/quickstart, or see its docs"
        if name == "devices":
            advice = "JAX cannot start its backend: JAX_PLATFORMS=cpu memtrain doctor tries the CPU"
        return Check(name, "broken", f"{type(error).__name__}: {first[0]}", advice)


def _devices() -> Check:
    import jax

    devices = jax.devices()
    kinds = sorted({device.device_kind for device in devices})
    stats = devices[0].memory_stats() or {}
    room = f", {_gib(stats['bytes_limit'])} each" if "bytes_limit" in stats else ""
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    count = f"{len(devices)} {jax.default_backend()}{processes}"
    return Check("devices", "ok", f"{count}: {', '.join(kinds)}{room}")


def _matmul() -> Check:
    """Rate of a float32 and a bfloat16 matrix product, half a second each."""
    import jax
    import jax.numpy as jnp

    size = 1024 if jax.default_backend() == "cpu" else 8192
    multiply = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    rates = []
    for dtype in ("float32", "bfloat16"):
        a = jnp.ones((size, size), dtype)
        result = multiply(a).block_until_ready()
        if not np.allclose(np.asarray(result[:2, :2]), size, rtol=1e-2):
            return Check("matmul", "broken", f"ones times ones gave {result[0, 0]}, not {size}")
        count, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < 0.5:
            multiply(a).block_until_ready()
            count += 1
        seconds = time.perf_counter() - begin
        rates.append(f"{2 * size**3 * count / seconds / 1e9:,.0f} GFLOP/s {dtype}")
    return Check("matmul", "ok", ", ".join(rates))


def _attention() -> Check:
    """Our attention against a dense one in float64: grouped heads, a window, packed documents."""
    import jax

    from memtrain_kernels import AttentionSpec, attention, last_backend

    batch, length, heads, kv_heads, dim, window = 2, 48, 4, 2, 16, 20
    rng = np.random.default_rng(0)
    q = rng.standard_normal((batch, length, heads, dim)).astype(np.float32)
    k, v = rng.standard_normal((2, batch, length, kv_heads, dim)).astype(np.float32)
    segments = np.sort(rng.integers(0, 3, (batch, length)), axis=1).astype(np.int32)
    with jax.default_matmul_precision("highest"):
        ours = attention(
            *(jax.numpy.asarray(a) for a in (q, k, v)),
            spec=AttentionSpec(window=window),
            q_segments=segments,
            kv_segments=segments,
        )
    index = np.arange(length)
    behind = index[:, None] - index[None, :]
    seen = (behind >= 0) & (behind < window) & (segments[:, :, None] == segments[:, None, :])
    k, v = (np.repeat(a.astype(np.float64), heads // kv_heads, axis=2) for a in (k, v))
    scores = np.einsum("bthd,bshd->bhts", q.astype(np.float64), k) / np.sqrt(dim)
    scores = np.where(seen[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    dense = np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v)
    error = float(np.abs(np.asarray(ours, np.float64) - dense).max())
    found = f"backend {last_backend()}, {error:.1e} from float64"
    if not error <= 1e-5:
        advice = "the numbers are wrong on this device: please report it, and use another"
        return Check("attention", "broken", found, advice)
    return Check("attention", "ok", found)


def _kernels() -> Check:
    """What a usual training call would run on, after the self-check where one is needed."""
    import jax

    from memtrain_kernels import AttentionSpec, partitioned, resolve_backend
    from memtrain_kernels.attention import Problem

    call = Problem(1, 4096, 4096, 8, 8, 128, 128, "bfloat16", AttentionSpec(), True, True, True)
    everywhere = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    with partitioned(everywhere, batch=("data",)):  # as training does on several devices
        name, reason = resolve_backend(None, call)
    found = f"bfloat16, head_dim 128, packed: {name} ({reason})"
    if "failed" in reason:
        advice = "the kernel of this device is left alone: slower, but right; please report it"
        return Check("kernels", "note", found, advice)
    return Check("kernels", "ok", found)


def cpu_cores() -> float:
    """Cores that this process may use, by its affinity and its container's quota."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0)
    cores = cores or float(os.cpu_count() or 1)
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdecimal():
        cores = min(cores, int(quota[0]) / int(quota[1]))
    return cores


def memory_bytes() -> int | None:
    """Memory of this machine, or of the container if that is less; None if it cannot be told."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return None
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return min(memory, int(limit)) if limit.isdecimal() else memory


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""


def _can_be_made(folder: Path) -> bool:
    """Whether the folder can be written, or made: its nearest existing parent can be written."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
