"""Sampling against a float64 oracle in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memtrain.decode.sampling import Sampling, kept_logits, sample
from memtrain.errors import BadInput


def oracle(logits, temperature, top_k, top_p):
    """Probabilities of one row: softmax, the k likeliest, then the shortest run that reaches p."""
    z = logits.astype(np.float64) / temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: (-logits[i], i))
    order = order[: top_k or len(p)]
    total = sum(p[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        kept.append(i)
        mass += p[i] / total
        if top_p is not None and mass >= top_p:
            break
    out = np.zeros(len(p))
    out[kept] = p[kept]
    return out / out.sum()


SETTINGS = [
    (1.0, None, None),
    (0.5, None, None),
    (1.7, 5, None),
    (0.8, 1, None),
    (1.0, 1000, None),
    (1.0, None, 0.63),
    (0.9, None, 1e-6),
    (1.0, None, 1.0),
    (1.3, 20, 0.71),
    (0.6, 7, 0.97),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_kept_tokens_and_their_probabilities(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(0, 2, (8, 50)).astype(np.float32)
    logits[0, 10:14] = logits[0].max()  # equal ones: the lower ids come first
    settings = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    found = np.asarray(jax.nn.softmax(kept_logits(jnp.asarray(logits), settings)))
    for row, p in zip(logits, found, strict=True):
        expected = oracle(row, temperature, top_k, top_p)
        assert ((p > 0) == (expected > 0)).all()
        np.testing.assert_allclose(p, expected, rtol=2e-5)


def draws(logits, settings, count, **more):
    one = lambda step: sample(logits, jnp.uint32(3), step, settings, **more)  # noqa: E731
    return np.asarray(jax.jit(jax.vmap(one))(jnp.arange(count, dtype=jnp.uint32)))


def test_draws_follow_the_distribution():
    """Chi-square of 20,000 draws, 11 tokens kept: its 99.9 % point at 10 degrees is 29.6."""
    logits = np.random.default_rng(1).normal(0, 1.5, (1, 30)).astype(np.float32)
    settings = Sampling(temperature=1.2, top_k=11)
    p = oracle(logits[0], 1.2, 11, None)
    counts = np.bincount(draws(jnp.asarray(logits), settings, 20_000)[:, 0], minlength=30)
    kept = p > 0
    assert kept.sum() == 11 and counts[~kept].sum() == 0
    wanted = 20_000 * p[kept]
    assert ((counts[kept] - wanted) ** 2 / wanted).sum() < 29.6


def test_greedy_takes_the_likeliest_and_the_lower_of_equals():
    logits = jnp.asarray([[0.0, 3.0, 3.0, -1.0], [5.0, 1.0, 2.0, 9.0]])
    settings = Sampling(temperature=0)
    assert sample(logits, jnp.uint32(0), jnp.uint32(0), settings).tolist() == [1, 3]
    limited = sample(logits, jnp.uint32(0), jnp.uint32(0), settings, num_tokens=3)
    assert limited.tolist() == [1, 0]


def test_ids_beyond_the_tokenizer_are_never_drawn():
    logits = jnp.asarray([[0.0, 0.0, 8.0]])
    found = draws(logits, Sampling(temperature=1, top_k=3, top_p=0.9), 200, num_tokens=2)
    assert set(found.ravel().tolist()) == {0, 1}


def test_a_draw_depends_on_seed_step_and_row_only():
    logits = jnp.zeros((4, 1000))

    def draw(seed, step, rows=4):
        settings = Sampling(temperature=1)
        return sample(logits[:rows], jnp.uint32(seed), jnp.uint32(step), settings).tolist()

    first = draw(1, 2)
    assert draw(1, 2) == first and draw(1, 2, rows=2) == first[:2]
    assert len(set(first)) == 4
    assert draw(1, 3) != first and draw(2, 2) != first


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
)
def test_settings_that_are_no_distribution(bad):
    with pytest.raises(BadInput, match=f"^{next(iter(bad))}="):
        Sampling(**bad)
