"""The process around a command: logging, and JAX's compilation cache and simulated CPU devices.

Importing JAX before `prepare` is fine, computing with it is not: XLA reads its flags once.
Imports no JAX itself.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import logging
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memtrain.errors import BadInput


_DEVICE_COUNT = "--xla_force_host_platform_device_count"
_PATIENCE_S = 24 * 3600


def prepare(num_devices: int = 1, *, say: Callable[[str], None] | None = None) -> None:
    """Set up the process for a command on `num_devices` devices, over all processes of the job.

    Turns the compilation cache on and, where there are only CPUs, simulates as many devices as
    fall to this process; explicit settings in the environment win. `say` (stderr unless given) is
    told in a line what was simulated or could not be set up. Raises `BadInput` if the backend has
    already started with fewer devices.
    """
    say = say or (lambda line: print(f"memtrain: {line}", file=sys.stderr))
    _log_to_stderr()
    _enable_cache(say)
    _simulate_devices(num_devices, say)
    if not accelerators():
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Has glibc keep what it frees, so that a step's buffers are not new pages each time.

    XLA on CPU allocates the temporaries of a program at every call. Given back to the system in
    between, a step of the quickstart took 227,000 page faults and a quarter of its time. True where
    it could be set: Linux with glibc. Resident memory stays at its peak.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    trim_threshold, mmap_max, arena_max = -1, -4, -8
    # One arena, from the heap that grows in place, never trimmed.
    return all((mallopt(mmap_max, 0), mallopt(trim_threshold, 2**31 - 1), mallopt(arena_max, 1)))


def cache_folder() -> Path | None:
    """Where compiled programs are kept; None if MEMTRAIN_CACHE=off.

    JAX_COMPILATION_CACHE_DIR, else xla/ in MEMTRAIN_CACHE, else in memtrain/ of the XDG cache. Ours
    has a folder per kind of processor: code compiled for one must not be loaded on another, and
    home folders are shared.
    """
    if explicit := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(explicit)
    chosen = os.environ.get("MEMTRAIN_CACHE")
    if chosen == "off":
        return None
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    base = Path(chosen) if chosen else Path(home) / "memtrain"
    return base.expanduser().absolute() / "xla" / _processor()


def accelerators() -> list[str]:
    """Accelerators that JAX will use, told without starting it: empty on a CPU-only machine.

    A device node alone is not enough: without its plugin JAX computes on the CPU beside it.
    """
    if os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return []
    signs = {
        "gpu": (
            ("nvidia[0-9]*", "kfd"),
            ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin"),
        ),
        "tpu": (("accel[0-9]*", "vfio/[0-9]*"), ("libtpu",)),
    }
    return [
        kind
        for kind, (nodes, plugins) in signs.items()
        if any(next(Path("/dev").glob(node), None) for node in nodes)
        and any(importlib.util.find_spec(plugin) for plugin in plugins)
    ]


def _processor() -> str:
    """The architecture and a hash of the instruction sets of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found = next(line for line in lines if line.startswith(("flags", "Features")))
        features = " ".join(sorted(found.partition(":")[2].split()))
    except (OSError, StopIteration):
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


class _OneLine(logging.Formatter):
    """name: message, and no traceback."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.name}: {' '.join(record.getMessage().splitlines())}"


def _log_to_stderr() -> None:
    """One log handler for all libraries, before one of them installs its own."""
    root = logging.getLogger()
    if root.handlers:
        return
    handler = logging.StreamHandler()
    if os.environ.get("MEMTRAIN_TRACEBACK") != "1":
        handler.setFormatter(_OneLine())
        # Orbax logs what its threads raise, at length, and then raises it in ours as well.
        handler.addFilter(lambda record: record.name != "absl" or not record.exc_info)
    root.addHandler(handler)


def _enable_cache(say: Callable[[str], None]) -> None:
    folder = cache_folder()
    if folder is None:
        _set("jax_enable_compilation_cache", False)
        return
    if "://" not in os.environ.get("JAX_COMPILATION_CACHE_DIR", ""):  # Not in object storage.
        try:
            folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(folder, os.W_OK)
        except OSError:
            writable = False
        if not writable:
            say(f"cannot write the compilation cache {folder}: every start will compile anew")
            return
        _set("jax_compilation_cache_dir", str(folder))
    # Thousands of small programs compile in less than the default second each.
    _set("jax_persistent_cache_min_compile_time_secs", 0.0)
    _set("jax_persistent_cache_min_entry_size_bytes", 0)


def _set(option: str, value: Any) -> None:
    """Set a JAX option for this process, imported yet or not, and for its children; theirs wins."""
    if option.upper() in os.environ and option != "jax_compilation_cache_dir":
        return
    os.environ[option.upper()] = str(value)
    if "jax" in sys.modules:
        sys.modules["jax"].config.update(option, value)


def _simulate_devices(num_devices: int, say: Callable[[str], None]) -> None:
    here = -(-num_devices // _num_processes())
    if here == 1:
        return
    if _backend_started():
        have = sys.modules["jax"].device_count()
        if have < num_devices:
            raise BadInput(
                f"the mesh needs {num_devices} devices and JAX has started with {have}: "
                f"begin in a new process, or with XLA_FLAGS={_DEVICE_COUNT}={num_devices}"
            )
        return
    flags = os.environ.get("XLA_FLAGS", "")
    if accelerators() or _DEVICE_COUNT in flags or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    os.environ["XLA_FLAGS"] = " ".join(
        [flags, f"{_DEVICE_COUNT}={here}", *_for_simulated_devices(flags)]
    ).strip()
    say(f"no accelerator found: {here} devices are simulated on this machine's CPU")


def _for_simulated_devices(flags: str) -> list[str]:
    """XLA's flags for devices that share a few cores, those left out that the caller has set.

    Devices that wait a minute for each other are taken for dead, and the process aborted: with long
    sequences they are only slow. And a device that starts operations beside each other gains
    nothing here, while XLA keeps a few KB for every step of a loop that it put off, until the loop
    ends: 35 MB a second in a ring over a million tokens.
    """
    wanted = {
        "--xla_cpu_collective_timeout_seconds": _PATIENCE_S,
        "--xla_cpu_collective_call_terminate_timeout_seconds": _PATIENCE_S,
        "--xla_cpu_enable_concurrency_optimized_scheduler": "false",
    }
    return [f"{name}={value}" for name, value in wanted.items() if name not in flags]


def _num_processes() -> int:
    """Processes of the job, as `memtrain.parallel.mesh.initialize_distributed` will find them."""
    name = "JAX_NUM_PROCESSES" if "JAX_COORDINATOR_ADDRESS" in os.environ else "SLURM_NTASKS"
    count = os.environ.get(name, "1")
    return max(1, int(count)) if count.isdecimal() else 1


def _backend_started() -> bool:
    # JAX has no public way to ask without starting it.
    bridge = sys.modules.get("jax._src.xla_bridge")
    started = getattr(bridge, "backends_are_initialized", None)
    return started is not None and started()
