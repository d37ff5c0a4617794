"""The kernel's own body, run by the emulator, against its twin: barriers, buffers, indices."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import emulator
import jax
import jax.numpy as jnp
import numpy as np
import paged_oracle as oracle
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from memtrain_kernels.attention import AttentionSpec
from memtrain_kernels.decode.hopper.operation import attend_by
from memtrain_kernels.decode.paging import Pages


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """The emulator, and what this kernel uses beyond it: one memory for two arrays, numbers."""
    plain = emulator._scratch

    def scratch(kind: Any) -> Any:
        if not isinstance(kind, plgpu.RefUnion):
            return plain(kind)
        memory = np.zeros(max(np.zeros(x.shape, x.dtype).nbytes for x in kind.refs), np.uint8)
        refs = []
        for x in kind.refs:
            view = memory[: np.zeros(x.shape, x.dtype).nbytes].view(x.dtype).reshape(x.shape)
            emulator._poison(view)
            refs.append(emulator.Ref(view))
        return refs

    def iota(dtype: Any, shape: tuple[int, ...], dim: int, *, layout: Any) -> jax.Array:
        return lax.broadcasted_iota(dtype, shape, dim)

    def poison(data: np.ndarray) -> None:
        data[...] = (
            -128 if data.dtype == np.int8 else -(2**30) if data.dtype.kind == "i" else np.nan
        )

    with (
        emulator.emulated(),
        mock.patch.object(emulator, "_scratch", scratch),
        mock.patch.object(emulator, "_poison", poison),
        mock.patch.object(plgpu, "broadcasted_iota", iota),
        mock.patch.object(plgpu, "wgmma_wait", emulator._wait_wgmma),
    ):
        yield


# More tiles than buffers, so that every buffer is used again; a row without a token; ragged ends.
CASES: dict[str, dict[str, Any]] = {
    "plain": {"spec": AttentionSpec(), "page_size": 64, "lengths": [470, 0]},
    "window, sinks, small pages": {
        "spec": AttentionSpec(window=300, sink_tokens=20, soft_cap=3.0),
        "page_size": 16,
        "lengths": [700, 33],
    },
    "int8": {
        "spec": AttentionSpec(),
        "page_size": 128,
        "head_dim": 256,
        "lengths": [500, 2],
        "pages": "int8",
        "dtype": "bfloat16",
    },
    "fp8, scales a page, chunks of queries": {
        "spec": AttentionSpec(window=400),
        "page_size": 32,
        "lengths": [600, 65],
        "pages": "float8_e4m3fn",
        "dtype": "bfloat16",
        "per_page": True,
        "heads": 36,
    },
}


def problem(
    lengths: list[int],
    page_size: int,
    pages: str = "float32",
    dtype: str = "float32",
    per_page: bool = False,
    head_dim: int = 64,
    heads: int = 6,
    **_: Any,
) -> tuple[jax.Array, Pages]:
    rng = np.random.default_rng(0)
    shape = {"page_size": page_size, "max_pages": 1024 // page_size, "kv_heads": 2}
    shape |= {"head_dim": head_dim}
    cache = oracle.cache(rng, lengths, **shape, dtype=pages, per_page=per_page)
    tables = np.clip(cache.block_tables, 0, cache.k_pages.shape[0] - 1)
    held = Pages(*jax.tree.map(jnp.asarray, cache._replace(block_tables=tables)))
    return jnp.asarray(rng.standard_normal((len(lengths), 2, heads, head_dim)), dtype), held


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_body_does_as_its_twin(case: str) -> None:
    options = CASES[case]
    q, pages = problem(**options)
    theirs = attend_by("twin", q, pages, options["spec"], 2)
    with emulated(), jax.disable_jit():
        ours = attend_by("kernel", q, pages, options["spec"], 2)
    for a, b in zip(ours, theirs, strict=True):
        oracle.close(a, b, 1e-6 if options.get("dtype") is None else 2e-3)


@pytest.mark.parametrize("left_out", ["barrier_wait", "commit_smem"])
def test_a_missing_step_is_noticed(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, pages = problem(lengths=[200], page_size=64)
    theirs = attend_by("twin", q, pages, AttentionSpec(), 1)
    with (
        emulated(),
        jax.disable_jit(),
        monkeypatch.context() as patch,
        pytest.raises(AssertionError),
    ):
        patch.setattr(plgpu, left_out, lambda *_: None)
        for a, b in zip(attend_by("kernel", q, pages, AttentionSpec(), 1), theirs, strict=True):
            oracle.close(a, b, 1e-6)
