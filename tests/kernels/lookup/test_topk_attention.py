"""Attention to the best few keys: picks by the search in float64, the rest by plain gathers."""

import functools

import jax
import jax.numpy as jnp
import lookup_oracle as oracle
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from memtrain_kernels import KeyedValues, partitioned, topk_attention


B, T, H, K, D, V = 2, 8, 4, 2, 8, 6
SIZES = (16, 8)  # an older part, and the queries' own tokens


def behind(q_pos, kv_pos, q_seg, kv_seg):
    return (kv_pos <= q_pos - 2) & (kv_pos > q_pos - 19)


def lately(q_pos, kv_pos, q_seg, kv_seg):
    return kv_pos > q_pos - 9


def draw(top_k: int, seed: int = 0) -> tuple[dict, np.ndarray]:
    """Queries at positions 16.. of two documents; the older part is a ring that has turned."""
    rng = np.random.default_rng(seed)
    positions = np.tile(np.arange(24, dtype=np.int32), (B, 1))
    segments = np.zeros((B, 24), np.int32)
    segments[1, 19:] = 1
    turned = np.roll(np.arange(16), 5)
    order = np.r_[turned, np.arange(16, 24)]
    keys = rng.normal(size=(B, 24, K, D)).astype(np.float32)
    keys[:, 9] = keys[:, 4]  # a tie, across the ring's end
    given = {
        "q": rng.normal(size=(B, T, H, D)).astype(np.float32),
        "keys": keys[:, order],
        "values": rng.normal(size=(B, 24, K, V)).astype(np.float32),
        "positions": positions[:, order],
        "segments": segments[:, order],
        "q_positions": positions[:, 16:],
        "q_segments": segments[:, 16:],
    }
    _, picks = oracle.topk(
        given["q"],
        given["keys"],
        top_k,
        positions=(given["q_positions"], given["positions"]),
        segments=(given["q_segments"], given["segments"]),
        mask_fn=behind,
    )
    return given, picks


def run(given: dict, q, keys, values, top_k: int, trained_fn):
    parts, at = [], 0
    for size in SIZES:

        def cut(x, at=at, size=size):
            return x[:, at : at + size]

        tokens = (jnp.asarray(cut(given[n])) for n in ("positions", "segments"))
        parts.append(KeyedValues(cut(keys), cut(values), *tokens))
        at += size
    return topk_attention(
        q,
        parts,
        top_k,
        q_positions=jnp.asarray(given["q_positions"]),
        q_segments=jnp.asarray(given["q_segments"]),
        mask_fn=behind,
        trained_fn=trained_fn,
    )


def reference(given: dict, picks: np.ndarray, q, keys, values, trained_fn):
    """(out, lse) by gathers of the picked rows, differentiated by JAX."""
    b = np.arange(B)[:, None, None, None]
    head = np.arange(H)[:, None] // (H // K)
    trained = np.zeros(picks.shape, bool)
    if trained_fn is not None:
        q_pos = given["q_positions"][:, :, None, None]
        trained = trained_fn(q_pos, given["positions"][b, picks], None, None)
    taken = []
    for x in (keys, values):
        x = x[b, picks, head]
        taken.append(jnp.where(trained[..., None], x, jax.lax.stop_gradient(x)))
    scores = jnp.where(picks >= 0, jnp.einsum("bthd,bthkd->bthk", q, taken[0]), -1e30)
    seen = (picks >= 0).any(axis=-1)
    weights = jax.nn.softmax(scores, axis=-1) * seen[..., None]
    lse = jnp.where(seen, jax.nn.logsumexp(scores, axis=-1), 0)
    return jnp.einsum("bthk,bthkv->bthv", weights, taken[1]), lse


def judged(function, w_out, w_lse):
    """(a weighted sum of out and lse, what the function returns), gradients: one program."""

    def loss(q, keys, values):
        found = function(q, keys, values)
        out, lse = found[:2]
        total = jnp.sum(out * w_out) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0) * w_lse)
        return total, found

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


MESHES = {"one device": None, "data2 context2 tensor2": (2, 2, 2), "context4": (1, 4, 1)}


@functools.cache
def problem(top_k: int, trained_fn):
    """What is given, the picks, the weights of `judged`, and what the plain gathers give."""
    given, picks = draw(top_k)
    operands = [jnp.asarray(given[n]) for n in ("q", "keys", "values")]
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(B, T, H, V)), rng.normal(size=(B, T, H))

    def want_by(q, k, v):
        return reference(given, picks, q, k, v, trained_fn)

    return given, picks, operands, weights, judged(want_by, *weights)(*operands)


@pytest.mark.parametrize(
    "mesh", [pytest.param(m, marks=pytest.mark.full if m == "context4" else ()) for m in MESHES]
)
@pytest.mark.parametrize(
    ("top_k", "trained_fn"),
    [
        (3, lately),
        pytest.param(3, None, marks=pytest.mark.full),
        pytest.param(20, lately, marks=pytest.mark.full),  # more than any query sees
    ],
)
def test_equals_plain_gathers_of_what_a_search_picks(mesh, top_k, trained_fn):
    given, picks, operands, weights, expected = problem(top_k, trained_fn)
    (want, (out, lse)), want_grads = expected

    def attend(q, keys, values):
        return run(given, q, keys, values, top_k, trained_fn)

    def answers():
        (got, found), grads = judged(attend, *weights)(*operands)
        # Not differentiated, it is another program: as it is without trained keys, for one.
        return got, grads, [found] if trained_fn else [found, jax.jit(attend)(*operands)]

    if MESHES[mesh] is None:
        got, grads, several = answers()
    else:
        shape = MESHES[mesh]
        devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
        names = ("data", "context", "tensor")
        over = Mesh(devices, names, axis_types=(AxisType.Auto,) * 3)
        with partitioned(over, batch=("data",), heads=("tensor",), sequence="context"):
            got, grads, several = answers()
    position = np.where(
        picks >= 0, given["positions"][np.arange(B)[:, None, None, None], picks], -1
    )
    for found in several:
        np.testing.assert_array_equal(found.positions, position)
        np.testing.assert_allclose(found.out, out, atol=2e-6)
        np.testing.assert_allclose(np.where(np.isfinite(found.lse), found.lse, 0), lse, atol=2e-6)
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    for g, w in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(g, w, atol=2e-5)
    if trained_fn is None:
        assert not np.any(grads[1]) and not np.any(grads[2])


@pytest.mark.full
def test_one_query_is_looked_up_by_all_devices():
    """Decoding: slots are sharded, the query is not."""
    given, picks = draw(5)
    one = given | {name: given[name][:, -1:] for name in ("q", "q_positions", "q_segments")}
    operands = [jnp.asarray(one[n]) for n in ("q", "keys", "values")]
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(1, 4), ("data", "context"))

    def attend(q, keys, values):
        return run(one, q, keys, values, 5, lately)

    rng = np.random.default_rng(2)
    w = rng.normal(size=(B, 1, H, V)), rng.normal(size=(B, 1, H))

    def want_by(q, k, v):
        return reference(one, picks[:, -1:], q, k, v, lately)

    (want, _), want_grads = judged(want_by, *w)(*operands)
    with partitioned(mesh, batch=("data",), sequence="context"):
        (got, _), grads = judged(attend, *w)(*operands)
        text = jax.jit(attend).lower(*operands).compile().as_text()
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    for g, expected in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(g, expected, atol=2e-5)
    assert text and "ppermute" not in text


@pytest.mark.full
def test_what_does_not_divide_is_gathered_and_said(caplog: pytest.LogCaptureFixture):
    given, _ = draw(3)
    operands = [jnp.asarray(given[n]) for n in ("q", "keys", "values")]
    alone = jax.jit(lambda q, keys, values: run(given, q, keys, values, 3, None))(*operands)
    mesh = Mesh(np.array(jax.devices()[:3]), ("context",))
    with partitioned(mesh, sequence="context"), caplog.at_level("INFO", "memtrain_kernels"):
        found = jax.jit(lambda q, keys, values: run(given, q, keys, values, 3, None))(*operands)
    np.testing.assert_allclose(found.out, alone.out, atol=1e-6)
    assert "lookup of 8 queries in 16 + 8 keys is not split over mesh axis 'context'" in caplog.text
