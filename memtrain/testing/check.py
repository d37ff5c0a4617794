"""`check_laws`: the laws of the Memory protocol, for a memory in anybody's repository."""

from __future__ import annotations

from collections.abc import Iterable

import jax

from memtrain.testing.bench import Bench
from memtrain.testing.laws import LAWS
from memtrain.testing.report import Report
from memtrain.testing.subject import MakeMemory


def check_laws(
    make_memory: MakeMemory,
    *,
    dim: int = 16,
    length: int = 21,
    seed: int = 0,
    laws: Iterable[str] | None = None,
    slow: bool = False,
) -> Report:
    """Holds a memory to the laws of DESIGN section 3; the same draws every time for one seed.

    make_memory: (Dtypes, nnx.Rngs) -> Memory, small, for inputs of width `dim`. Called several
      times; it must use the dtypes it is given.
    length: tokens in a row: more than twice the longest window that the memory has, at least 13.
    laws: names out of `memtrain.testing.LAWS`; all unless given. `moves` is always checked.
    slow: every mesh, more cuts, the long runs at full length, and programs compiled as in training;
      without it, on CPU, XLA leaves machine code as it comes, in half the time.

    Returns what held, what is not offered and what could not be checked here. Raises LawBroken, an
    AssertionError that names the law, the case and the leaf, at the first law broken; ValueError
    for arguments that name no law.
    """
    asked = list(LAWS) if laws is None else list(laws)
    if unknown := [law for law in asked if law not in LAWS]:
        raise ValueError(f"laws={unknown}: no such law; there are {list(LAWS)}")
    bench = Bench(make_memory, dim=dim, seed=seed, length=length, slow=slow)
    # What rounding does to a product is not what the laws are about.
    with jax.default_matmul_precision("highest"):
        outcomes = [LAWS[law](bench) for law in LAWS if law == "moves" or law in asked]
    return Report(type(bench.subject().memory).__name__, outcomes)
