"""Linear recurrences in chunks: beside the same token by token, and beside `transformers` on CPU.

    tools/bench scan --rival PYTHON       an interpreter that has torch and transformers

Forward, and forward with backward, of Gated DeltaNet and of Mamba-2's state space duality on the
same inputs in one run, each in turn. All outputs are compared with those token by token first.
`--lengths` gives the time a token of longer and longer sequences, forward, and of single tokens.
"""

from __future__ import annotations

import functools
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import interleaved, median_ratio, write

from memtrain.train.records import versions
from memtrain_kernels import gated_delta


@dataclass(frozen=True)
class Options:
    tokens: int = 4096
    heads: int = 4
    key_heads: int = 2
    head_dim: int = 128
    """Of keys and values in Gated DeltaNet, and of Mamba-2's states; its values have half."""
    lengths: tuple[int, ...] = (16_384, 131_072, 1_048_576)
    rounds: int = 5
    rival: Path | None = None
    out: Path | None = None


def main() -> None:
    options = tyro.cli(Options)
    inputs = {"gated delta": delta_inputs(options), "mamba2": mamba2_inputs(options)}
    rival = None if options.rival is None else Rival(options.rival, inputs)
    results: dict[str, Any] = {}
    for name, run in inputs.items():
        outputs = {b: np.asarray(_forward(name, b)(run)) for b in ("xla", "reference")}
        if rival is not None:
            outputs["transformers"] = rival.outputs[name]
        for other, out in outputs.items():
            scale = np.abs(outputs["reference"]).max()
            np.testing.assert_allclose(out / scale, outputs["reference"] / scale, atol=1e-4)
            print(f"{name}: {other} agrees")
        for way in ("forward", "backward"):
            results[f"{name} {way}"] = compare(options, name, way, run, rival)
    lengths = {str(T): by_length(options, T) for T in options.lengths}
    lengths["single token"] = single(options)
    about = {"device": jax.devices()[0].device_kind, **vars(options), "out": None, "rival": None}
    software = versions() | ({} if rival is None else {"torch": rival.version})
    write(options.out, "scan", {**about, "cases": results, "seconds_a_token": lengths}, software)


def delta_inputs(options: Options) -> dict[str, np.ndarray]:
    """Unit keys; decays and writing as a Gated DeltaNet begins with."""
    T, G, H, D = options.tokens, options.key_heads, options.heads, options.head_dim
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    step = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), H)).astype(np.float32)
    rate = rng.uniform(1, 16, H).astype(np.float32)
    return {
        "query": unit(normal(1, T, G, D)),
        "key": unit(normal(1, T, G, D)),
        "value": normal(1, T, H, D),
        "log_decay": -rate * step * np.exp(0.3 * normal(1, T, H)),
        "write": 1 / (1 + np.exp(-normal(1, T, H))),
    }


def mamba2_inputs(options: Options) -> dict[str, np.ndarray]:
    """As many heads again of half the values; one key head."""
    T, H, D = options.tokens, 2 * options.heads, options.head_dim
    rng = np.random.default_rng(1)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    step = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), H)).astype(np.float32)
    steps = step * np.exp(0.3 * normal(1, T, H))
    return {
        "query": normal(1, T, 1, D),
        "key": normal(1, T, 1, D),
        "value": normal(1, T, H, D // 2),
        "log_decay": -rng.uniform(1, 16, H).astype(np.float32) * steps,
        "write": steps,
    }


@functools.cache
def _forward(name: str, backend: Any) -> Callable[..., jax.Array]:
    def call(run: dict[str, Any]) -> jax.Array:
        more: dict[str, Any] = {"erase": run["write"]} if name == "gated delta" else {"scale": 1.0}
        return gated_delta(**run, **more, backend=backend)[0]

    return jax.jit(call)


@functools.cache
def _backward(name: str, backend: str) -> Callable[..., Any]:
    return jax.jit(jax.grad(lambda run: jnp.sum(jnp.square(_forward(name, backend)(run)))))


def compare(
    options: Options, name: str, way: str, run: dict[str, np.ndarray], rival: Rival | None
) -> dict[str, Any]:
    make = _forward if way == "forward" else _backward
    candidates: dict[str, Callable[[], Any]] = {
        backend: lambda backend=backend: jax.block_until_ready(make(name, backend)(run))
        for backend in ("xla", "reference")
    }
    seconds = interleaved(candidates, rounds=options.rounds, warmup=1)
    if rival is not None:
        # It tells its own seconds: what is asked and answered does not count.
        seconds["transformers"] = []
        seconds["xla beside it"] = []
        for _ in range(options.rounds + 1):
            seconds["transformers"].append(rival.seconds(name, way))
            seconds["xla beside it"] += interleaved({"xla": candidates["xla"]}, rounds=1, warmup=0)[
                "xla"
            ]
        seconds = {n: s[-options.rounds :] for n, s in seconds.items()}
    found = {f"{n} seconds": statistics.median(s) for n, s in seconds.items()}
    found["token by token over chunked"] = median_ratio(seconds, "xla", "reference")
    if rival is not None:
        found["transformers over chunked"] = median_ratio(seconds, "xla beside it", "transformers")
    print(f"{name}, {way}: " + ", ".join(f"{n} {value:.3g}" for n, value in found.items()))
    return found


class Rival:
    """`scan_rival.py` under another interpreter."""

    def __init__(self, python: Path, inputs: dict[str, dict[str, np.ndarray]]):
        self.folder = tempfile.TemporaryDirectory()
        given, made = (Path(self.folder.name) / name for name in ("inputs.npz", "outputs.npz"))
        arrays = {f"{name} {n}": x for name, run in inputs.items() for n, x in run.items()}
        np.savez(given, allow_pickle=False, **arrays)
        script = Path(__file__).with_name("scan_rival.py")
        self.process = subprocess.Popen(
            [python, "-P", script, given, made],  # -P: our files shadow none of its modules
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.version = self._answer()
        self.outputs = dict(np.load(made))

    def seconds(self, name: str, way: str) -> float:
        assert self.process.stdin is not None
        print(f"{name} {way}", file=self.process.stdin, flush=True)
        return float(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("scan: the rival has ended; its interpreter needs torch, transformers")
        return line.strip()


def by_length(options: Options, tokens: int) -> float:
    """Seconds a token of a forward pass of Gated DeltaNet over so many, its inputs made anew."""
    T, H, D = options.tokens, options.heads, options.head_dim
    run: dict[str, Any] = {name: jnp.asarray(x) for name, x in delta_inputs(options).items()}

    # A part at a time, with the state carried: as a model reads a long text.
    @jax.jit
    def read(state: jax.Array) -> jax.Array:
        body = lambda S, _: (gated_delta(**run, erase=run["write"], state=S)[1], None)  # noqa: E731
        return jax.lax.scan(body, state, None, length=tokens // T)[0]

    state = jnp.zeros((1, H, D, D))
    call = lambda: jax.block_until_ready(read(state))  # noqa: E731
    seconds = interleaved({"read": call}, rounds=1, warmup=1)["read"][0] / tokens
    print(f"{tokens} tokens: {seconds * 1e6:.2f} us a token")
    return seconds


def single(options: Options) -> float:
    """Seconds of a single token, from a state: the same whatever was read before."""
    run: dict[str, Any] = {name: jnp.asarray(x[:, :1]) for name, x in delta_inputs(options).items()}
    step = jax.jit(lambda S: gated_delta(**run, erase=run["write"], state=S), donate_argnums=0)
    state = jnp.zeros((1, options.heads, options.head_dim, options.head_dim))
    times = []
    for _ in range(100):
        times += interleaved({"step": lambda: jax.block_until_ready(step(state + 0))}, rounds=1)[
            "step"
        ]
    return statistics.median(times)


if __name__ == "__main__":
    main()
