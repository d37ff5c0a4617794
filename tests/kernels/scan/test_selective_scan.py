"""The selective scan against its definition in float64, and its gradients by complex steps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memtrain_kernels import compiling_for, selective_scan, selective_transition


B, T, D, N = 2, 150, 5, 3


def draw(seed: int) -> dict[str, Any]:
    """float32 arguments: documents, padding on either side, decays of all sizes."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    starts, valid = rng.random((B, T)) < 0.03, np.ones((B, T), bool)
    valid[0, :5] = False
    valid[1, -7:] = False
    return {
        "value": normal(B, T, D),
        "step": np.exp(2 * normal(B, T, D) - 2),
        "rate": np.exp(normal(D, N)),
        "key": normal(B, T, N),
        "query": normal(B, T, N),
        "starts": starts,
        "valid": valid,
        "state": normal(B, D, N),
    }


def defined(run: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Outputs, 0 where invalid, and the state after: token by token."""
    kind = complex if any(np.iscomplexobj(x) for x in run.values()) else float
    w = {n: x if x.dtype == bool else x.astype(kind) for n, x in run.items()}
    h, out = w["state"].copy(), np.zeros((B, T, D), kind)
    for t in range(T):
        entering = np.where(w["starts"][:, t, None, None], 0, h)
        step = w["step"][:, t, :, None]
        new = step * w["value"][:, t, :, None] * w["key"][:, t, None]
        after = np.exp(-step * w["rate"]) * entering + new
        h = np.where(w["valid"][:, t, None, None], after, h)
        out[:, t] = np.where(w["valid"][:, t, None], np.sum(h * w["query"][:, t, None], -1), 0)
    return out, h


def close(found: Any, want: np.ndarray) -> None:
    assert np.abs(np.asarray(found) - want).max() <= 1e-5 * max(1.0, np.abs(want).max())


@pytest.fixture(params=["cpu", "tpu"])
def target(request):
    """Tokens in turn, and all of a chunk at once."""
    with compiling_for(request.param, "TPU v5p" if request.param == "tpu" else "cpu"):
        yield


@pytest.mark.usefixtures("target")
def test_outputs_state_and_transition():
    run = draw(0)
    out, state = defined(run)
    found, after = jax.jit(selective_scan)(**run)
    close(np.where(run["valid"][..., None], found, 0), out)
    close(after, state)
    given = {n: x for n, x in run.items() if n not in ("query", "state")}
    cut = lambda at: {n: x if n == "rate" else x[:, at] for n, x in given.items()}  # noqa: E731
    first, then = (selective_transition(**cut(at)) for at in (slice(70), slice(70, None)))
    close(first.then(then).advance(run["state"]), state)
    close(then.advance(first.advance(run["state"])), state)


@pytest.mark.usefixtures("target")
def test_gradients():
    rng = np.random.default_rng(1)
    run = draw(1)
    out, state = defined(run)
    d_out, d_state = (rng.standard_normal(x.shape).astype(np.float32) for x in (out, state))
    d_out = np.where(run["valid"][..., None], d_out, 0)
    moved = {n: x for n, x in run.items() if x.dtype != bool}

    def total(moved):
        out, state = selective_scan(**run | moved)
        return jnp.sum(out * d_out) + jnp.sum(state * d_state)

    gradients = jax.jit(jax.grad(total))(moved)
    for name, x in moved.items():
        way = rng.standard_normal(x.shape)
        out, state = defined(run | {name: x + 1e-20j * way})
        want = (np.sum(out.imag * d_out) + np.sum(state.imag * d_state)) / 1e-20
        found = np.sum(np.asarray(gradients[name], np.float64) * way)
        size = np.linalg.norm(gradients[name]) * np.linalg.norm(way)
        assert abs(found - want) <= 1e-5 * size, name


@pytest.mark.usefixtures("target")
def test_not_one_bit_of_an_earlier_document_is_felt():
    run, other = draw(2), draw(3)
    run["starts"][:, 70] = True
    for name in ("value", "step", "key", "query"):
        other[name][:, 70:] = run[name][:, 70:]
    changed = run | {n: other[n] for n in ("value", "step", "key", "query", "state")}
    before, after = (jax.jit(selective_scan)(**r) for r in (run, changed))
    np.testing.assert_array_equal(before[0][:, 70:], after[0][:, 70:])
    np.testing.assert_array_equal(before[1], after[1])


GIVEN = draw(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": GIVEN["value"][0]}, r"value has shape .*: give \[B, T, D\]"),
        ({"step": GIVEN["step"][..., :2]}, r"step has shape .*: give \(2, 150, 5\)"),
        ({"rate": GIVEN["rate"][:2]}, r"rate has shape .*: give \(5, 3\)"),
        ({"key": GIVEN["key"][:, :9]}, r"key has shape .*: give \(2, 150, 3\)"),
        ({"query": GIVEN["query"][:, :9]}, r"query has shape .*: give that of key"),
        ({"starts": GIVEN["starts"][:1]}, r"starts is bool\[1, 150\]: give bool \[2, 150\]"),
        ({"state": GIVEN["state"][:1]}, r"state has shape .*: give \(2, 5, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**GIVEN | change)
