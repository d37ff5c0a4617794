"""Runs a Mosaic GPU kernel's own Python body on CPU: threads for warpgroups, NumPy for memory.

Every thread block gets one Python thread a warpgroup; barriers count arrivals and phases as the
hardware's do. What is asynchronous is late here on purpose: a copy into shared memory poisons its
destination at once and delivers when someone waits for its barrier; a wgmma reads its operands when
its result is waited for; a copy out happens at the wait for copies. So a missing wait, a buffer
freed too early, a phase missed or a deadlock shows as wrong numbers or an error. Layouts, swizzles,
the proxies of memory and speed are not emulated.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


PATIENCE_S = 60
_state = threading.local()


def warpgroup() -> int:
    """The number of the warpgroup that runs."""
    return _state.axes["warpgroup"]


class EmulationError(AssertionError):
    """The kernel broke a rule of the machine."""


def _index(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(_index(i) for i in index)
    if isinstance(index, pl.Slice):
        return slice(int(index.start), int(index.start) + int(index.size))
    return index if index is Ellipsis or isinstance(index, slice) else int(index)


def _view(data: np.ndarray, index: Any) -> np.ndarray:
    """Garbage that was read too early may be an index, too: a fault of the kernel, not of ours."""
    try:
        return data[_index(index)]
    except IndexError as error:
        raise EmulationError(f"out of bounds: {error}") from error


def _read(data: np.ndarray) -> jax.Array:
    # Copied here and now: jax may take its copy later, when the memory has changed.
    return jnp.asarray(np.array(data))


class Ref:
    """A view of memory."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data
        self.shape, self.dtype = data.shape, data.dtype

    @property
    def at(self) -> Any:
        outer = self

        class At:
            def __getitem__(self, index: Any) -> Ref:
                view = _view(outer.data, index)
                parts = index if isinstance(index, tuple) else (index,)
                for part, length in zip(parts, outer.shape, strict=False):
                    if isinstance(part, pl.Slice) and int(part.start) + int(part.size) > length:
                        raise EmulationError(f"out of bounds: {index} of {outer.shape}")
                return Ref(view)

        return At()

    def transpose(self, axes: tuple[int, ...]) -> Ref:
        return Ref(self.data.transpose(axes))

    def __getitem__(self, index: Any) -> jax.Array:
        return _read(_view(self.data, index))

    def __setitem__(self, index: Any, value: jax.Array) -> None:
        self.data[_index(index)] = np.asarray(value)
        _state.dirty = True


class Barrier:
    """Counts arrivals; every num_arrivals of them end a phase."""

    def __init__(self, num_arrivals: int) -> None:
        self.num_arrivals = num_arrivals
        self.arrived, self.phases = 0, 0
        self.changed = threading.Condition()
        self.copies: list[Callable[[], None]] = []
        self.waited: dict[int, int] = {}

    def arrive(self) -> None:
        with self.changed:
            self._arrive()

    def _arrive(self) -> None:
        self.arrived += 1
        if self.arrived == self.num_arrivals:
            self.arrived, self.phases = 0, self.phases + 1
            self.changed.notify_all()

    def _deliver(self) -> None:
        for copy in self.copies:
            copy()
            self._arrive()
        self.copies.clear()

    def wait(self) -> None:
        time.sleep(_state.random.random() * 1e-3)
        me = warpgroup()
        mine = self.waited.get(me, 0)
        deadline = time.monotonic() + PATIENCE_S
        with self.changed:
            self._deliver()
            while self.phases <= mine:
                if _state.block.failed or time.monotonic() > deadline:
                    raise EmulationError(f"warpgroup {me} waits for ever")
                self.changed.wait(0.01)
                self._deliver()
            # The hardware knows a phase by its parity alone.
            if self.phases - mine > 1:
                raise EmulationError(f"warpgroup {me} missed a phase")
        self.waited[me] = mine + 1


class Barriers:
    def __init__(self, barriers: list[Barrier]) -> None:
        self.barriers = barriers

    @property
    def at(self) -> Any:
        outer = self

        class At:
            def __getitem__(self, index: Any) -> Barrier:
                return outer.barriers[int(index)]

        return At()


class Accumulator:
    """A wgmma accumulator: what was issued into it is computed when it is waited for."""

    def __init__(self, shape: tuple[int, ...], dtype: Any = jnp.float32, value: Any = None):
        self.shape, self.dtype = shape, dtype
        self.value = jnp.zeros(shape, dtype) if value is None else value

    @staticmethod
    def init(array: jax.Array) -> Accumulator:
        return Accumulator(array.shape, array.dtype, array)

    def __getitem__(self, index: Any) -> jax.Array:
        return _load_accumulator(self)


class _Block:
    """What the warpgroups of one thread block share."""

    def __init__(self) -> None:
        self.failed = False
        self.registers: dict[int, int] = {}


def _wgmma(acc: Accumulator, a: Any, b: Ref) -> None:
    def run() -> None:
        left = _read(a.data) if isinstance(a, Ref) else a
        acc.value = acc.value + jnp.dot(left, _read(b.data), preferred_element_type=acc.dtype)

    _state.issued.append(run)


def _wait_wgmma(left: int) -> None:
    while len(_state.issued) > left:
        _state.issued.pop(0)()


def _load_accumulator(acc: Accumulator, *, wait_n: int | None = 0) -> jax.Array:
    _wait_wgmma(0 if wait_n is None else wait_n)
    return acc.value


def _run_scoped(body: Callable[..., Any], *types: Accumulator) -> Any:
    return body(*(Accumulator(t.shape, t.dtype) for t in types))


def _run_state(body: Callable[[Any], None]) -> Callable[[Any], Any]:
    def run(accs: Any) -> Any:
        body(accs)
        _wait_wgmma(0)
        many = isinstance(accs, tuple)
        return tuple(acc.value for acc in accs) if many else accs.value

    return run


def _poison(data: np.ndarray) -> None:
    data[...] = -(2**30) if data.dtype.kind == "i" else np.nan


def _copy_in(src: Ref, dst: Ref, barrier: Barrier) -> None:
    if src.shape != dst.shape or src.dtype != dst.dtype:
        raise EmulationError(f"copy of {src.shape} {src.dtype} into {dst.shape} {dst.dtype}")
    _poison(dst.data)
    with barrier.changed:
        barrier.copies.append(lambda: np.copyto(dst.data, src.data))
        barrier.changed.notify_all()


def _copy_out(src: Ref, dst: Ref) -> None:
    if _state.dirty:
        raise EmulationError("a copy out of shared memory that was not committed")
    if src.shape != dst.shape or src.dtype != dst.dtype:
        raise EmulationError(f"copy of {src.shape} {src.dtype} into {dst.shape} {dst.dtype}")
    _state.leaving.append(lambda: np.copyto(dst.data, src.data))


def _wait_out(n: int) -> None:
    while len(_state.leaving) > n:
        _state.leaving.pop(0)()


def _commit() -> None:
    _state.dirty = False


def _set_registers(n: int, *, action: str) -> None:
    _state.block.registers[warpgroup()] = n


def _kernel(body: Callable[..., None], **options: Any) -> Callable[..., Any]:
    single = not isinstance(options["out_type"], tuple)
    out_types = (options["out_type"],) if single else options["out_type"]

    def run(*operands: jax.Array) -> Any:
        inputs = [Ref(np.array(x)) for x in operands]
        outputs = [Ref(np.zeros(t.shape, t.dtype)) for t in out_types]
        for out in outputs:
            _poison(out.data)
        for at in itertools.product(*(range(n) for n in options["grid"])):
            axes = dict(zip(options["grid_names"], at, strict=True))
            _run_block(body, [*inputs, *outputs], axes, options)
        results = tuple(jnp.asarray(out.data) for out in outputs)
        return results[0] if single else results

    return run


def _run_block(body, refs: list[Ref], axes: dict[str, int], options: dict[str, Any]) -> None:
    block = _Block()
    scratch = {name: _scratch(t) for name, t in options["scratch_types"].items()}
    errors: list[BaseException] = []

    def run(n: int) -> None:
        _state.axes = {**axes, options["thread_name"]: n}
        _state.block, _state.issued, _state.leaving, _state.dirty = block, [], [], False
        _state.random = random.Random(n)
        try:
            with jax.disable_jit():
                body(*refs, **scratch)
            if _state.issued or _state.leaving:
                raise EmulationError("a warpgroup ended with work under way")
        except BaseException as error:
            block.failed = True
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(options["num_threads"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    if 128 * sum(block.registers.values()) > 65536:
        raise EmulationError(f"more registers than there are: {block.registers}")


def _scratch(kind: Any) -> Any:
    if isinstance(kind, plgpu.Barrier):
        many = kind.num_barriers
        if not isinstance(many, tuple) or not many:
            return Barrier(kind.num_arrivals)
        barriers = [Barrier(kind.num_arrivals) for _ in range(many[0])]
        return Barriers(barriers)
    data = np.zeros(kind.shape, kind.dtype)
    _poison(data)
    return Ref(data)


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """While inside, kernels of plgpu.kernel are emulated."""
    fakes = {
        "kernel": _kernel,
        "copy_gmem_to_smem": _copy_in,
        "copy_smem_to_gmem": _copy_out,
        "wait_smem_to_gmem": _wait_out,
        "commit_smem": _commit,
        "barrier_arrive": lambda barrier: barrier.arrive(),
        "barrier_wait": lambda barrier: barrier.wait(),
        "wgmma": _wgmma,
        "wgmma_accumulator_load": _load_accumulator,
        "WGMMAAccumulatorRef": Accumulator,
        "load": lambda ref, *, layout=None, optimized=True: ref[...],
        "layout_cast": lambda x, layout: x,
        "set_max_registers": _set_registers,
    }
    with (
        mock.patch.multiple(plgpu, **fakes),
        mock.patch.multiple(pl, run_scoped=_run_scoped, run_state=_run_state),
        mock.patch.object(jax.lax, "axis_index", lambda name: jnp.int32(_state.axes[name])),
    ):
        yield
