"""What holds to the bit, or near it: unseen keys, unseen rows, cuts of the queries, merges."""

from typing import Any

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memtrain_kernels import AttentionSpec, attention, merge
from memtrain_kernels.attention import blocks, direct


@pytest.fixture(autouse=True)
def decode_as_on_one_device(monkeypatch):
    monkeypatch.setattr(direct.jax, "device_count", lambda: 1)


def draw(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def everything(spec, q, k, v, d_out, tokens):
    """out, lse and all gradients, lse with a cotangent too."""

    def run(q, k, v):
        return attention(q, k, v, spec=spec, return_lse=True, **tokens)

    (out, lse), pullback = jax.vjp(run, q, k, v)
    return out, lse, *pullback((d_out, jnp.cos(lse)))


@pytest.mark.parametrize("form", ["unrolled", "looped", "decode"])
def test_a_key_that_is_not_seen_moves_not_one_bit(form, monkeypatch):
    if form == "looped":
        monkeypatch.setattr(blocks, "_MAX_UNROLLED", 0)
    rng = np.random.default_rng(0)
    S = 24
    T = 1 if form == "decode" else S
    segments = np.repeat([[0, 1, -1], [0, 0, 1]], 8, axis=1)
    tokens: dict[str, Any] = {"q_segments": segments[:, S - T :], "kv_segments": segments}
    tokens["q_positions"] = np.arange(S - T, S)
    spec = AttentionSpec(ordered=form == "unrolled", soft_cap=5.0, block_kv=None if T == 1 else 8)
    q, k, v = draw(rng, 2, T, 2, 8), draw(rng, 2, S, 2, 8), draw(rng, 2, S, 2, 8)
    d_out = draw(rng, 2, T, 2, 8)
    run = jax.jit(lambda q, k, v, d: everything(spec, q, k, v, d, tokens))

    before = run(q, k, v, d_out)
    first = (segments == [[0], [0]])[..., None, None]  # the first document of each row
    loud = jnp.where(first, 1e6 * draw(rng, *k.shape), 0)
    after = run(q, k + loud, v - loud, d_out)
    if form != "decode":
        assert np.abs(np.asarray(after[0]) - np.asarray(before[0])).max() > 1
    rows = ~first[:, S - T :, 0, 0]
    for name, one, two in zip(("out", "lse", "dq"), before[:3], after[:3], strict=True):
        np.testing.assert_array_equal(np.asarray(one)[rows], np.asarray(two)[rows], err_msg=name)
    for name, one, two in zip(("dk", "dv"), before[3:], after[3:], strict=True):
        keys = ~first[..., 0, 0]
        np.testing.assert_array_equal(np.asarray(one)[keys], np.asarray(two)[keys], err_msg=name)


@pytest.mark.parametrize("backend", ["reference", "xla", "looped", "decode"])
def test_rows_that_see_nothing_are_zero_with_no_gradient(backend, monkeypatch):
    if backend == "looped":
        monkeypatch.setattr(blocks, "_MAX_UNROLLED", 0)
    T = 1 if backend == "decode" else 9
    rng = np.random.default_rng(1)
    segments = np.where(np.arange(9) < 4, -1, 0)[None]
    tokens: dict[str, Any] = {"q_segments": segments[:, :T], "kv_segments": segments}
    tokens["q_positions"] = np.arange(T) - 2  # the first two queries stand before every key
    spec = AttentionSpec(block_q=None if T == 1 else 3, block_kv=None if T == 1 else 4)
    q, k, v, d_out = (draw(rng, 1, n, 2, 4) for n in (T, 9, 9, T))
    force = "reference" if backend == "reference" else "xla"

    def run(q, k, v):
        return attention(q, k, v, spec=spec, return_lse=True, backend=force, **tokens)

    @jax.jit
    def both(q, k, v, d_out):
        (out, lse), pullback = jax.vjp(run, q, k, v)
        d_lse = jnp.where(jnp.isfinite(lse), 1.0, jnp.nan)  # what the gradient of sin(-inf) gives
        return out, lse, pullback((d_out, d_lse if force == "xla" else jnp.ones_like(lse)))

    out, lse, grads = both(q, k, v, d_out)
    # Keys 4.. at positions 4.. are seen from position 4 on, which is query 6.
    unseen = np.arange(T) < 6
    assert (np.asarray(out)[:, unseen] == 0).all()
    assert (np.asarray(lse)[:, unseen] == -np.inf).all()
    assert np.isfinite(np.asarray(lse)[:, ~unseen]).all()
    assert all(np.isfinite(g).all() for g in grads)
    assert (np.asarray(grads[0])[:, unseen] == 0).all()
    assert (np.asarray(grads[1])[:, :4] == 0).all() and (np.asarray(grads[2])[:, :4] == 0).all()
    if T > 1:
        assert np.abs(np.asarray(grads[1])[:, 4]).max() > 0


def test_any_cut_of_the_queries_gives_the_same_rows():
    """Whole sequence, chunks, and token by token against a cache with empty slots."""
    rng = np.random.default_rng(2)
    T, slots = 21, 32
    segments, positions = oracle.packed(rng, 2, T, documents=3)
    q, k, v = draw(rng, 2, T, 4, 8), draw(rng, 2, T, 2, 8), draw(rng, 2, T, 2, 8)

    def fill(x, value=0):
        return np.concatenate([x, np.full((2, slots - T, *x.shape[2:]), value, x.dtype)], axis=1)

    cache: dict[str, Any] = {"kv_segments": fill(segments, -1), "kv_positions": fill(positions)}
    whole = attention(
        q,
        k,
        v,
        spec=AttentionSpec(window=6, sink_tokens=1, ordered=True, block_q=8, block_kv=8),
        q_positions=positions,
        kv_positions=positions,
        q_segments=segments,
        kv_segments=segments,
    )
    step = jax.jit(
        lambda q, k, v, q_positions, q_segments: attention(
            q,
            k,
            v,
            spec=AttentionSpec(window=6, sink_tokens=1),
            q_positions=q_positions,
            q_segments=q_segments,
            **cache,
        )
    )
    for lengths in ([1] * T, [13, 8]):
        parts, at = [], 0
        for n in lengths:
            cut = slice(at, at + n)
            at += n
            parts.append(
                step(q[:, cut], fill(np.asarray(k), 9), fill(np.asarray(v), 9), positions[:, cut],
                     segments[:, cut])
            )  # fmt: skip
        oracle.close(jnp.concatenate(parts, axis=1), whole, 1e-5)


def test_merge_of_two_halves_is_the_whole_with_its_gradient():
    rng = np.random.default_rng(3)
    q, k, v, d_out = (draw(rng, 1, 8, 2, 4) for _ in range(4))
    spec = AttentionSpec()

    def part(q, k, v, keys):
        tokens: dict[str, Any] = {"q_positions": np.arange(8), "kv_positions": np.arange(8)[keys]}
        return attention(q, k[:, keys], v[:, keys], spec=spec, return_lse=True, **tokens)

    def joined(q, k, v):
        out, lse = merge(part(q, k, v, slice(0, 5)), part(q, k, v, slice(5, 8)))
        return jnp.sum(out * d_out) + jnp.sum(jnp.sin(lse))

    def whole(q, k, v):
        out, lse = attention(q, k, v, spec=spec, return_lse=True)
        return jnp.sum(out * d_out) + jnp.sum(jnp.sin(lse))

    for ours, theirs in zip(
        jax.tree.leaves(jax.jit(jax.value_and_grad(joined, (0, 1, 2)))(q, k, v)),
        jax.tree.leaves(jax.jit(jax.value_and_grad(whole, (0, 1, 2)))(q, k, v)),
        strict=True,
    ):
        oracle.close(ours, theirs, 1e-5)


def test_merge_by_hand_and_at_minus_infinity():
    one = (jnp.array([[[[1.0, 2.0]]]]), jnp.log(jnp.array([[[3.0]]])))
    two = (jnp.array([[[[5.0, -2.0]]]]), jnp.log(jnp.array([[[1.0]]])))
    nothing = (jnp.zeros((1, 1, 1, 2)), jnp.full((1, 1, 1), -jnp.inf))

    o, lse = merge(one, two)  # weights 3/4 and 1/4
    np.testing.assert_allclose(o[0, 0, 0], [2.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(lse[0, 0, 0], np.log(4.0), rtol=1e-6)
    for a, b in ((one, nothing), (nothing, one)):
        o, lse = merge(a, b)
        np.testing.assert_array_equal(o, one[0])
        np.testing.assert_allclose(lse, one[1], rtol=1e-6)
    o, lse = merge(nothing, nothing)
    assert (o == 0).all() and (lse == -jnp.inf).all()

    def finite_part(o1, lse1, o2, lse2):
        o, lse = merge((o1, lse1), (o2, lse2))
        return o.sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

    for a, b in ((one, nothing), (nothing, one), (nothing, nothing)):
        grads = jax.grad(finite_part, (0, 1, 2, 3))(*a, *b)
        assert all(np.isfinite(g).all() for g in grads)


def test_a_sink_logit_is_seen_even_where_no_key_is():
    q = k = v = jnp.ones((1, 2, 2, 4))
    hidden = np.array([[0, -1]])
    sinks = jnp.array([0.5, -jnp.inf])
    run = lambda sinks: attention(  # noqa: E731
        q, k, v, q_segments=hidden, kv_segments=hidden, sink_logits=sinks, return_lse=True
    )
    out, lse = run(sinks)
    assert (out[0, 1] == 0).all()
    np.testing.assert_array_equal(lse[0, 1], sinks)
    # By hand: one key with score 4 / 2, its value shared with the sink's zero.
    np.testing.assert_allclose(out[0, 0, 0, 0], np.exp(2) / (np.exp(2) + np.exp(0.5)), rtol=1e-6)
    np.testing.assert_allclose(lse[0, 0], [np.log(np.exp(2) + np.exp(0.5)), 2.0], rtol=1e-6)
    grads = jax.grad(lambda s: run(s)[0].sum())(sinks)
    assert np.isfinite(grads).all() and grads[0] < 0 and grads[1] == 0
