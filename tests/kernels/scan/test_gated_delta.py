"""The gated delta rule, chunked and token by token, against its definition in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_oracle import TOKENS, delta_rule, draw_run

from memtrain_kernels import gated_delta, gated_delta_transition
from memtrain_kernels.scan import chunked
from memtrain_kernels.scan.triangular import unit_lower_inverse


# Every pair of decay, erase and write occurs.
KINDS = [
    (None, None, None),
    (None, "head", "channel"),
    (None, "channel", "head"),
    ("head", None, "channel"),
    ("head", "head", "head"),
    ("head", "channel", None),
    ("channel", None, "head"),
    ("channel", "head", None),
    ("channel", "channel", "channel"),
]
DIFFERENT = ("query", "key", "value", "log_decay", "erase", "write", "state")


@functools.cache
def compiled(backend: str | None) -> Any:
    return jax.jit(functools.partial(gated_delta, backend=backend))


def close(found: Any, want: np.ndarray, tolerance: float = 1e-5) -> None:
    scale = max(1.0, np.abs(want).max())
    assert np.abs(np.asarray(found) - want).max() <= tolerance * scale


def check(run: dict[str, Any], found: Any, tolerance: float = 1e-5) -> None:
    """Outputs of valid tokens, and the state."""
    out, state = delta_rule(run)
    valid = run["valid"][..., None, None]
    close(np.where(valid, found[0], 0), out, tolerance)
    close(found[1], state, tolerance)


@pytest.mark.parametrize("kinds", KINDS, ids=lambda k: "-".join(map(str, k)))
def test_chunked(kinds):
    run = draw_run(np.random.default_rng(0), *kinds)
    check(run, compiled("xla")(**run))


@pytest.mark.parametrize("kinds", [("head", "head", "head"), ("channel", "channel", "channel")])
def test_token_by_token(kinds):
    run = draw_run(np.random.default_rng(1), *kinds)
    check(run, compiled("reference")(**run))
    one = {n: x[:, 7:8] if n != "state" else x for n, x in run.items()}
    check(one, compiled(None)(**one))


@pytest.mark.parametrize("kinds", [KINDS[3], KINDS[4], KINDS[6], KINDS[8]], ids=str)
def test_transitions_are_what_a_run_does_to_any_state(kinds):
    """Those of two runs, one after the other, are that of both; the first may have no document's
    beginning, or the second."""
    run = draw_run(np.random.default_rng(2), *kinds)
    run["starts"] = np.zeros_like(run["starts"])
    run["starts"][0, 100] = run["starts"][1, 11] = True
    given = {n: x for n, x in run.items() if n not in ("query", "state")}
    cut = lambda at: {n: None if x is None else x[:, at] for n, x in given.items()}  # noqa: E731
    of = jax.jit(gated_delta_transition)
    first, then, whole = of(**cut(slice(64))), of(**cut(slice(64, None))), of(**given)
    want = delta_rule(run)[1]
    close(whole.advance(run["state"]), want)
    close(first.then(then).advance(run["state"]), want)
    close(then.advance(first.advance(run["state"])), want)


@pytest.mark.parametrize("kinds", [KINDS[4], KINDS[8], KINDS[0]], ids=str)
@pytest.mark.parametrize("segment", [None, 128])
def test_gradients(kinds, segment, monkeypatch):
    """Of outputs and final state with respect to everything, along drawn directions."""
    if segment is not None:
        monkeypatch.setattr(chunked, "SEGMENT", segment)
    rng = np.random.default_rng(3)
    run = draw_run(rng, *kinds)
    out, state = delta_rule(run)
    d_out, d_state = (rng.standard_normal(x.shape).astype(np.float32) for x in (out, state))
    d_out = np.where(run["valid"][..., None, None], d_out, 0)
    moved = {n: x for n in DIFFERENT if (x := run[n]) is not None}

    def total(moved):
        out, state = gated_delta(**run | moved)
        return jnp.sum(out * d_out) + jnp.sum(state * d_state)

    gradients = jax.jit(jax.grad(total))(moved)
    for name, x in moved.items():
        way = rng.standard_normal(x.shape)
        out, state = delta_rule(run | {name: x + 1e-20j * way})
        want = (np.sum(out.imag * d_out) + np.sum(state.imag * d_state)) / 1e-20
        found = np.sum(np.asarray(gradients[name], np.float64) * way)
        size = np.linalg.norm(gradients[name]) * np.linalg.norm(way)
        assert abs(found - want) <= 1e-5 * size, name


@pytest.mark.parametrize("kinds", [KINDS[4], KINDS[8]], ids=str)
def test_segments_change_nothing(kinds, monkeypatch):
    run = draw_run(np.random.default_rng(4), *kinds, tokens=2 * TOKENS)
    monkeypatch.setattr(chunked, "SEGMENT", 128)
    check(run, jax.jit(gated_delta)(**run))


@pytest.mark.parametrize("kinds", [KINDS[4], KINDS[8]], ids=str)
def test_a_small_decay_behind_a_large_one(kinds):
    """Sums of decays are not differenced: after e^-15 a token, a fading by 1e-3 is still exact. And
    nothing overflows, however long it goes on."""
    run = draw_run(np.random.default_rng(5), *kinds)
    run["log_decay"][:, ::3] = -15.0
    run["log_decay"][:, 1::3] = -1e-3
    run["log_decay"][:, 2::3] = -0.1
    check(run, compiled("xla")(**run))
    run["log_decay"][:] = -15.0
    check(run, compiled("xla")(**run))


def test_a_log_decay_below_the_least_counts_as_it():
    run = draw_run(np.random.default_rng(6), "head", "head", "head")
    run["log_decay"][:, ::5] = -1e4
    found = compiled("xla")(**run)
    run["log_decay"] = np.maximum(run["log_decay"], -15)
    check(run, found)


def test_one_key_again_and_again():
    """The worst that erasing has to solve: every token erases all that every other wrote."""
    run = draw_run(np.random.default_rng(7), "head", "head", "head")
    run["key"][:] = run["key"][:, :1]
    run["erase"][:] = 1.0
    run["log_decay"][:] = 0.0
    check(run, compiled("xla")(**run))


@pytest.mark.parametrize("kinds", [KINDS[4], KINDS[8]], ids=str)
def test_not_one_bit_of_an_earlier_document_is_felt(kinds):
    rng = np.random.default_rng(8)
    run = draw_run(rng, *kinds)
    run["starts"][:, 70] = True
    other = draw_run(rng, *kinds)
    early = (np.arange(TOKENS) < 70)[None, :, None, None]
    changed = {
        n: np.where(early if x.ndim == 4 else early[..., 0], other[n], x)
        for n, x in run.items()
        if n in DIFFERENT and n != "state"
    }
    before, after = (compiled("xla")(**run | c) for c in ({}, changed | {"state": other["state"]}))
    np.testing.assert_array_equal(before[0][:, 70:], after[0][:, 70:])
    np.testing.assert_array_equal(before[1], after[1])
    assert not np.array_equal(before[0][:, :70], after[0][:, :70])


def test_the_state_is_float32_and_outputs_have_the_values_dtype():
    run = draw_run(np.random.default_rng(9), "head", "head", "head")
    narrow = {n: x.astype(jnp.bfloat16) for n, x in run.items() if n in ("query", "key", "value")}
    out, state = compiled("xla")(**run | narrow)
    assert out.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    check(run | {n: np.asarray(x, np.float32) for n, x in narrow.items()}, (out, state), 1e-2)


@pytest.mark.parametrize("size", [1, 8, 16, 32, 64])
def test_inverse(size):
    rng = np.random.default_rng(10)
    a = np.tril(rng.standard_normal((3, size, size)), -1).astype(np.float32) / size**0.5
    want = np.linalg.inv(np.eye(size) + a.astype(np.float64))
    close(jax.jit(unit_lower_inverse)(a), want)
    d = rng.standard_normal(a.shape).astype(np.float32)
    found = jax.grad(lambda a: jnp.sum(unit_lower_inverse(a) * d))(a)
    close(found, np.tril(-want.swapaxes(1, 2) @ d @ want.swapaxes(1, 2), -1), 1e-4)


GIVEN = draw_run(np.random.default_rng(0), "head", "head", "head")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": GIVEN["query"][0]}, r"query has shape .*: give \[B, T, heads, dim\]"),
        ({"query": GIVEN["query"].astype(int)}, "query has dtype int32: give a floating dtype"),
        ({"key": GIVEN["key"][..., :5]}, r"key has shape .*: give that of query, \(2, 150, 2, 8\)"),
        ({"value": GIVEN["value"][:, :9]}, r"value has shape .*: give \[2, 150, heads, dim\]"),
        ({"value": GIVEN["value"][:, :, :3]}, "value has 3 heads: give a multiple of query's 2"),
        ({"log_decay": GIVEN["erase"][..., :2]}, r"log_decay has shape .*: give \(2, 150, 4\) or"),
        ({"erase": GIVEN["value"]}, r"erase has shape .*: give \(2, 150, 4\) or \(2, 150, 4, 8\)"),
        ({"write": GIVEN["query"]}, r"write has shape .*: give \(2, 150, 4\) or \(2, 150, 4, 6\)"),
        ({"write": GIVEN["erase"].astype(int)}, "write has dtype int32: give a floating dtype"),
        ({"starts": GIVEN["valid"][:1]}, r"starts is bool\[1, 150\]: give bool \[2, 150\]"),
        ({"valid": GIVEN["valid"].astype(int)}, r"valid is int.*: give bool \[2, 150\]"),
        ({"state": GIVEN["state"][:, :2]}, r"state has shape .*: give \(2, 4, 8, 6\)"),
        ({"backend": "tpu"}, "backend='tpu': it is 'xla' or 'reference'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        gated_delta(**GIVEN | change)
