"""ShortConv against a loop over tokens in float64, whole and through its state."""

import numpy as np
import pytest
from compiled import call, compiled
from flax import nnx
from memory_oracles import short_conv as oracle

from memtrain.description import BuildContext, Dtypes
from memtrain.memory import Context, ShortConv, ShortConvConfig, spec_bytes


DIM, T = 6, 16


def build(size: int) -> ShortConv:
    return ShortConvConfig(size).build(BuildContext(dim=DIM, dtypes=Dtypes()), rngs=nnx.Rngs(0))


def layout() -> tuple[Context, np.ndarray]:
    """Two rows: documents with padding on both sides, and one that is full."""
    documents = np.array([[-1, -1] + [0] * 3 + [1] + [2] * 8 + [-1] * 2, [0] * T])
    starts = np.diff(documents, axis=1, prepend=-1) > 0
    positions = np.array([[0, 0, 0, 1, 2, 0, *range(8), 0, 0], range(T)], np.int32)
    return Context(positions, starts, documents >= 0), documents  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [2, 5])
def test_whole_and_in_pieces_equal_the_loop(size):
    memory = build(size)
    ctx, documents = layout()
    x = np.random.default_rng(0).normal(size=(2, T, DIM)).astype(np.float32)
    taps = np.asarray(memory.taps[...], np.float64)
    want = np.stack([oracle(x[r].astype(np.float64), taps, documents[r]) for r in range(2)])
    valid = documents >= 0
    y, none, _ = call(memory, x, None, ctx)
    assert none is None
    np.testing.assert_allclose(np.asarray(y)[valid], want[valid], atol=1e-6)

    state, at = compiled(lambda m: m.init_state(2, T))(memory), 0
    for n in (1, 3, 8, 1, 3):
        y, state, _ = call(memory, x[:, at : at + n], state, ctx.window(at, at + n))
        part = valid[:, at : at + n]
        got, wanted = np.asarray(y)[part], want[:, at : at + n][part]
        np.testing.assert_allclose(got, wanted, atol=1e-6, err_msg=f"token {at}")
        at += n
    np.testing.assert_array_equal(state["input"][0], x[0, 14 - (size - 1) : 14])


def test_the_state_has_one_size():
    memory = build(4)
    assert spec_bytes(memory.state_spec(2, 10)) == spec_bytes(memory.state_spec(2, 10**6))
    assert spec_bytes(memory.state_spec(2, 10)) == 2 * (3 * DIM * 4 + 3 * 4 + 4)


def test_a_convolution_of_one_token_is_refused():
    with pytest.raises(ValueError, match="size=1: it takes 2 or more"):
        ShortConvConfig(1)
