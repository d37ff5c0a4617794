"""Seven architectures against `transformers` itself: whole and token by token, both ways.

The oracle (`oracle.py`) runs in a process of its own, by the Python that MEMTRAIN_PARITY_PYTHON
names: `tools/test --parity` makes one. Nothing of it is imported here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memtrain.interop.huggingface import load, save
from memtrain.memory import Context
from memtrain.model.config import Block, ModelConfig
from memtrain.model.parameters import Skeleton


PYTHON = os.environ.get("MEMTRAIN_PARITY_PYTHON")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        not PYTHON, reason="transformers is not here: tools/test --parity makes an environment"
    ),
]

BAR = 1e-4
FELT = 1e-2
"""What breaking one thing must do to some logit, at least."""

NAMES = ("llama", "mistral", "qwen3", "mamba", "mamba2", "jamba", "qwen3_next")

Parameters = dict[str, np.ndarray]


class Oracle:
    def __init__(self, out: Path):
        self.out, self.errors = out, open(out / "stderr.txt", "w+")  # noqa: SIM115
        command = [PYTHON or "", str(Path(__file__).with_name("oracle.py")), str(out)]
        # It sees none of our environment, and asks no hub for anything.
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=env | {"HF_HUB_OFFLINE": "1"},
        )
        self._wait()

    def _wait(self) -> None:
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "done\n":
            self.process.wait()
            self.errors.seek(0)
            raise RuntimeError(f"the oracle failed: {self.errors.read()[-2000:]}")

    def reads(self, folder: Path, tokens: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        """(logits, what it says of keys) of a model that we wrote."""
        np.save(folder / "tokens.npy", tokens)
        assert self.process.stdin is not None
        print(folder, file=self.process.stdin, flush=True)
        self._wait()
        said = json.loads((folder / "loading.json").read_text())
        return np.load(folder / "logits.npy"), said

    def close(self) -> None:
        self.process.communicate()
        self.errors.close()


@pytest.fixture(scope="module")
def oracle(tmp_path_factory) -> Iterator[Oracle]:
    made = Oracle(tmp_path_factory.mktemp("oracle"))
    yield made
    made.close()


class Case:
    """A model of the oracle's as we read it, its programs compiled once."""

    def __init__(self, folder: Path):
        config, self.vocab_size, self.parameters = load(folder)
        # Repeats as a scan: one is compiled, not all.
        self.config = dataclasses.replace(config, scan_unroll=1)
        self.tokens, self.want = np.load(folder / "tokens.npy"), np.load(folder / "logits.npy")
        assert self.want.std() > 0.5

    def run(self, config: ModelConfig) -> Callable:
        skeleton = Skeleton.of(config, self.vocab_size)

        def run(parameters, tokens, state, ctx):
            model = skeleton.merge(parameters)
            hidden, state, _ = model(tokens, state, ctx)
            return model.logits(hidden), state

        return jax.jit(run)

    @cached_property
    def compiled(self) -> Callable:
        return self.run(self.config)

    @property
    def ctx(self) -> Context:
        return Context.of_documents(*self.tokens.shape)

    def logits(self, parameters: Parameters | None = None, ctx: Context | None = None) -> Any:
        logits, _ = self.compiled(
            self.parameters if parameters is None else parameters,
            self.tokens,
            None,
            self.ctx if ctx is None else ctx,
        )
        return logits

    def decoded(
        self, edit: Callable[[Any], Any] | None = None, tokens: int | None = None
    ) -> np.ndarray:
        """Logits of the first tokens, one at a time. edit: what happens to the state between."""
        batch, total = self.tokens.shape
        model = Skeleton.of(self.config, self.vocab_size).merge(
            {name: jnp.asarray(a) for name, a in self.parameters.items()}
        )
        state, found = jax.jit(lambda m: m.init_state(batch, total))(model), []
        for t in range(tokens or total):
            token = self.tokens[:, t : t + 1]
            logits, state = self.compiled(self.parameters, token, state, self.ctx.window(t, t + 1))
            state = state if edit is None else edit(state)
            found.append(np.asarray(logits))
        return np.concatenate(found, axis=1)


@pytest.fixture(scope="module")
def cases(oracle: Oracle) -> dict[str, Case]:
    return {}


@pytest.fixture(params=NAMES)
def case(request, oracle: Oracle, cases: dict[str, Case]) -> tuple[str, Case]:
    name = request.param
    if name not in cases:
        cases[name] = Case(oracle.out / name)
    return name, cases[name]


def difference(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())


def test_prefill_and_single_tokens_equal_transformers(case, record_property):
    name, case = case
    found = {
        "prefill": difference(case.logits(), case.want),
        "token by token": difference(case.decoded(), case.want),
    }
    record_property(name, found)
    print(f"{name}: {found}")
    assert max(found.values()) < BAR, found


def test_what_we_write_is_loaded_by_transformers(case, oracle, tmp_path):
    """Parameters of our own drawing; none is where it began."""
    name, case = case
    drawn = Skeleton.of(case.config, case.vocab_size).init(jax.random.key(1))
    rng = np.random.default_rng(2)
    parameters = {
        n: np.asarray(a) + 0.1 * rng.standard_normal(a.shape, np.float32) * (np.std(a) + 0.5)
        for n, a in drawn.items()
    }
    assert all((parameters[n] != a).any() for n, a in drawn.items())
    save(tmp_path / name, case.config, parameters)
    logits, said = oracle.reads(tmp_path / name, case.tokens)
    assert said == {}
    found = difference(case.logits(parameters), logits)
    print(f"{name}: {found}")
    assert found < BAR and logits.std() > 0.1


def test_a_model_that_scales_its_embeddings(oracle, cases, tmp_path):
    """Tied, and as every model of ours is by default: the final norm makes up for the scale."""
    case = Case(oracle.out / "mistral")
    case.config = dataclasses.replace(case.config, embedding_scale=None)
    assert case.config.tied_embeddings
    save(tmp_path / "own", case.config, case.parameters)
    logits, said = oracle.reads(tmp_path / "own", case.tokens)
    assert said == {} and difference(case.logits(), logits) < BAR * logits.std()


def times(pattern: str, factor: float, plus: float = 0.0) -> Callable[[Parameters], Parameters]:
    """Parameters whose names end so, changed; there must be some."""

    def change(parameters: Parameters) -> Parameters:
        hits = [name for name in parameters if name.endswith(pattern)]
        assert hits, pattern
        return parameters | {name: parameters[name] * factor + plus for name in hits}

    return change


def no_last_tap(parameters: Parameters) -> Parameters:
    """The convolution forgets the oldest of its tokens."""
    hits = [name for name in parameters if name.endswith("taps")]
    assert hits
    changed = {name: parameters[name].copy() for name in hits}
    for taps in changed.values():
        taps[:, -1] = 0
    return parameters | changed


def mixers(config: ModelConfig, **fields: Any) -> ModelConfig:
    """The model with these fields in every mixer that sets them to anything."""

    def change(block: Any) -> Any:
        assert isinstance(block, Block) and block.mixer is not None
        own = {k: v for k, v in fields.items() if getattr(block.mixer, k, None) is not None}
        return dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, **own))

    changed = dataclasses.replace(config, pattern=tuple(change(b) for b in config.pattern))
    assert changed != config
    return changed


SCALE = {"softmax scale": times("mixer.layer.query.weight", 1.1)}
NORMED_SCALE = {
    "softmax scale": times("query_norm.scale", 1.2),
    "key norm": times("key_norm.scale", 0.5, 0.5),
}
SCAN = {
    "convolution": no_last_tap,
    "dt bias": times("step_bias", 1.0, 0.1),
    "rates": times("log_rate", 1.0, 0.1),
}
MAMBA = SCAN | {"convolution's bias": times("conv.bias", 0.0), "skip": times("skip", 1.1)}

OF_PARAMETERS: dict[str, dict[str, Callable[[Parameters], Parameters]]] = {
    "llama": SCALE,
    "mistral": SCALE,
    "qwen3": NORMED_SCALE,
    "mamba": MAMBA,
    "mamba2": MAMBA | {"norm": times("mixer.layer.norm.scale", 0.5, 0.5)},
    "jamba": SCALE
    | MAMBA
    | {f"norm of {n}": times(f"{n}_norm.scale", 0.5, 0.5) for n in ("step", "key", "query")}
    | {"router": times("router.weight", 1.2)},
    "qwen3_next": NORMED_SCALE
    | SCAN
    | {
        "router": times("router.weight", 1.2),
        "shared gate": times("shared_gate.weight", 0.0),
        "output gate": times("output_gate.weight", 0.0),
        "norm": times("mixer.layer.norm.scale", 0.5, 0.5),
    },
}

OF_CONFIG: dict[str, dict[str, Callable[[ModelConfig], ModelConfig]]] = {
    "llama": {
        "rope": lambda c: mixers(c, rope_theta=600.0),
        "epsilon": lambda c: dataclasses.replace(c, norm_epsilon=1e-6),
    },
    "mistral": {
        "rope": lambda c: mixers(c, rope_theta=600.0),
        "window": lambda c: mixers(c, window=12),
    },
    "qwen3": {
        "rope": lambda c: mixers(c, rope_theta=600.0),
        "window": lambda c: mixers(c, window=10),
    },
    "mamba2": {"norm's groups": lambda c: mixers(c, norm_groups=1)},
}
"""Few, since each is compiled."""


def test_breaking_one_thing_is_felt(case):
    name, case = case
    felt = {}
    for what, change in OF_PARAMETERS[name].items():
        felt[what] = difference(case.logits(change(case.parameters)), case.want)
    for what, alter in OF_CONFIG.get(name, {}).items():
        changed, _ = case.run(alter(case.config))(case.parameters, case.tokens, None, case.ctx)
        felt[what] = difference(changed, case.want)
    if name == "qwen3_next":
        # Positions that run twice as fast turn as another theta would, and nothing is compiled.
        ctx = dataclasses.replace(case.ctx, positions=2 * case.ctx.positions)
        felt["rope"] = difference(case.logits(ctx=ctx), case.want)
    print(f"{name}: {felt}")
    assert min(felt.values()) > FELT, felt


def forget(state: Any, leaf: str) -> Any:
    """The state with every leaf of this name zero."""
    hits = 0

    def clear(path: tuple, array: Any) -> Any:
        nonlocal hits
        if path[-1] != jax.tree_util.DictKey(leaf):
            return array
        hits += 1
        return jnp.zeros_like(array)

    cleared = jax.tree_util.tree_map_with_path(clear, state)
    assert hits
    return cleared


STATES = {
    "mamba": ("input", "hidden"),
    "mamba2": ("input", "matrix"),
    "jamba": ("input", "hidden", "value"),
    "qwen3_next": ("input", "matrix", "value"),
}
"""Leaves of the state: the tails of convolutions, what a recurrence holds, a cache's values."""


def test_forgetting_a_state_is_felt(case):
    """One part of it, between single tokens."""
    name, case = case
    for leaf in STATES.get(name, ("value",)):
        found = case.decoded(lambda state, leaf=leaf: forget(state, leaf), tokens=8)
        assert difference(found, case.want[:, :8]) > FELT, leaf
