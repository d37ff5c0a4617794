"""One table of tolerances for all memories, and the comparisons that read it."""

from __future__ import annotations

from typing import Any, Literal

import jax
import numpy as np

from memtrain.testing.report import LawBroken, Outcome


Kind = Literal["value", "gradient"]

TOLERANCES: dict[tuple[str, Kind], float] = {
    ("float32", "value"): 1e-5,
    ("float32", "gradient"): 1e-4,
    ("bfloat16", "value"): 2e-2,
    ("bfloat16", "gradient"): 2e-2,
}
"""|a - b| <= tolerance * max(1, max|b|), by the dtype that the memory computes in."""

TOP_K_MARGIN = {"float32": 1e-4, "bfloat16": 5e-2}
"""Least margin between what a memory selects and what it leaves. Exact ties are margins too."""

LEAST_MOVE = 0.1
"""A memory under test moves its block's output by at least this fraction of the input's rms."""

DRIFT = 3e-2
"""Relative rms error of bfloat16 against float32 that a long run may reach."""


def named_leaves(tree: Any) -> dict[str, np.ndarray]:
    """Host copies of all leaves by path; gradients of integers are left out."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if leaf.dtype != jax.dtypes.float0:
            found[jax.tree_util.keystr(path) or "output"] = np.asarray(leaf)
    return found


class Judge:
    """Compares trees of arrays on behalf of one law and counts what it compared."""

    def __init__(self, law: str):
        self.outcome = Outcome(law)

    def broken(self, case: str, leaf: str, error: str) -> LawBroken:
        return LawBroken(self.outcome.law, case, leaf, error)

    def require(self, holds: bool, case: str, leaf: str, error: str) -> None:
        self.outcome.checks += 1
        if not holds:
            raise self.broken(case, leaf, error)

    def close(
        self,
        case: str,
        got: Any,
        want: Any,
        dtype: str = "float32",
        kind: Kind = "value",
        where: np.ndarray | None = None,
    ) -> None:
        """Floats within the tolerance, all else equal. where: bool [B, T], what to compare."""
        tolerance = TOLERANCES[dtype, kind]
        for name, a, b in self._pairs(case, got, want):
            if not _is_float(b):
                self._equal(case, name, a, b, where)
                continue
            a, b = a.astype(np.float64), b.astype(np.float64)
            error, size = np.abs(a - b), np.abs(b)
            if where is not None:
                error, size = _only(error, where), _only(size, where)
            if not error.size:
                continue
            self.outcome.checks += 1
            bound = tolerance * max(1.0, float(size.max()))
            worst = np.unravel_index(np.nan_to_num(error, nan=np.inf).argmax(), error.shape)
            if not error[worst] <= bound:
                raise self.broken(
                    case,
                    _at(name, worst),
                    f"{a[worst]:.8g} where {b[worst]:.8g} is right: "
                    f"error {error[worst]:.2g} > {bound:.2g}",
                )
            self.outcome.worst = max(self.outcome.worst, float(error[worst]) / bound)

    def same_bits(self, case: str, got: Any, want: Any, where: np.ndarray | None = None) -> None:
        """Not one bit differs."""
        for name, a, b in self._pairs(case, got, want):
            self._equal(case, name, a, b, where)

    def same_array(self, case: str, name: str, a: np.ndarray, b: np.ndarray) -> None:
        """`same_bits` of one leaf by name."""
        self._equal(case, name, a, b, None)

    def zero(self, case: str, tree: Any, where: np.ndarray | None = None) -> None:
        """Exactly zero, of either sign."""
        for name, leaf in named_leaves(tree).items():
            leaf = leaf if where is None else leaf[where]
            self.require(
                not np.any(leaf != 0), case, name, f"{_largest(leaf):.3g} where 0 is right"
            )

    def nonzero(self, case: str, tree: Any, why: str) -> None:
        for name, leaf in named_leaves(tree).items():
            self.require(_largest(leaf) > 1e-6, case, name, why)

    def finite(self, case: str, tree: Any) -> None:
        for name, leaf in named_leaves(tree).items():
            good = bool(np.isfinite(leaf.astype(np.float64)).all())
            self.require(good, case, name, "is not finite")

    def _pairs(self, case: str, got: Any, want: Any):
        a, b = named_leaves(got), named_leaves(want)
        if a.keys() != b.keys():
            raise self.broken(case, "structure", f"leaves {list(a)} where {list(b)} are right")
        for name in b:
            if a[name].shape != b[name].shape or a[name].dtype != b[name].dtype:
                raise self.broken(
                    case,
                    name,
                    f"{a[name].dtype}{list(a[name].shape)} where "
                    f"{b[name].dtype}{list(b[name].shape)} is right",
                )
            yield name, a[name], b[name]

    def _equal(
        self, case: str, name: str, a: np.ndarray, b: np.ndarray, where: np.ndarray | None
    ) -> None:
        self.outcome.checks += 1
        bits = f"u{b.dtype.itemsize}"
        differs = np.ascontiguousarray(a).view(bits) != np.ascontiguousarray(b).view(bits)
        if where is not None:
            differs = _only(differs, where)
        if differs.any():
            first = np.unravel_index(differs.argmax(), b.shape)
            raise self.broken(
                case,
                _at(name, first),
                f"{a[first]!s} where {b[first]!s} is right, and {int(differs.sum())} of {b.size} "
                "differ: bits must be the same",
            )


def _only(a: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Zero outside `where`, which is of the leading dimensions."""
    return np.where(where.reshape(where.shape + (1,) * (a.ndim - where.ndim)), a, 0)


def _is_float(a: np.ndarray) -> bool:
    return a.dtype.kind == "f" or a.dtype.name == "bfloat16"


def _largest(a: np.ndarray) -> float:
    return float(np.abs(a.astype(np.float64)).max()) if a.size else 0.0


def _at(name: str, index: tuple) -> str:
    return f"{name}[{', '.join(str(int(i)) for i in index)}]"
