"""Defaults of every test run: eight CPU devices, a compilation cache, reproducible draws, and
shapes checked at every call.

Set before anything imports jax; what the caller has set in the environment stays.
"""

import os
import platform
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook


def _set_jax_defaults() -> None:
    # The same everywhere; who wants the tests of an accelerator asks for it by JAX_PLATFORMS.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        flags = f"{flags} --xla_force_host_platform_device_count=8"
    # Machine code that LLVM has not optimised takes a third of the time to make, and most of a test
    # run is that. `tools/test --slow` runs the code that users run.
    optimized = os.environ.get("MEMTRAIN_TEST_OPTIMIZED") == "1"
    if not optimized and "xla_backend_optimization_level" not in flags:
        flags = f"{flags} --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = flags.strip()
    # jax writes entries in place, so each worker keeps a folder of its own: a reader never meets
    # half an entry. The host is in the name since compiled code is for one kind of CPU.
    worker = os.environ.get("PYTEST_XDIST_WORKER", "alone")
    folder = Path(sys.prefix) / "cache" / "jax" / f"{platform.node()}-{worker}"
    if os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could set the number of devices")
_set_jax_defaults()


def _check_shapes() -> None:
    """Every function with jaxtyping in its signature checks its arguments and result by beartype.

    Not where pytrees are declared, a `Context` or a `TrainState`: what transformations put into
    their fields (shardings, specs, host arrays) is no array of that shape.
    """
    root = Path(__file__).parents[1]
    modules = [
        ".".join(path.relative_to(root).with_suffix("").parts)
        for path in sorted((root / "memtrain").rglob("*.py"))
        if "from jaxtyping import" in path.read_text(encoding="utf-8")
    ]
    pytrees = {"memtrain.memory.protocol", "memtrain.train.state"}
    install_import_hook(sorted({*modules} - pytrees), "shape_checks.check")


_check_shapes()

settings.register_profile("memtrain", derandomize=True, deadline=None, database=None)
settings.load_profile("memtrain")


def pytest_configure(config: pytest.Config) -> None:
    if folder := os.environ.get("MEMTRAIN_TEST_PROFILE"):
        from cpu_profile import Profile

        config.pluginmanager.register(Profile(Path(folder)))


# Of a minute and more each: begun first, or one process would be at the last of them alone.
LONGEST = ("laws/test_registry.py", "golden/test_golden.py", "train/test_processes.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST))
