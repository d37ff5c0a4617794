"""The protocol's own pieces: specs, contexts, documents, overflow, the registry."""

import jax.numpy as jnp
import numpy as np
import pytest

from memtrain.errors import BadInput
from memtrain.memory import (
    REGISTRY,
    AttentionConfig,
    Context,
    LeafSpec,
    Memory,
    register,
    spec_bytes,
)
from memtrain.memory.protocol import raise_on_overflow, token_documents


def test_bytes_are_counted_by_leaf():
    spec = {
        "a": LeafSpec((2, 3), jnp.bfloat16, ("batch", None)),
        "b": [LeafSpec((2,), jnp.int32, ("batch",))],
    }
    assert spec_bytes(spec) == 2 * 3 * 2 + 2 * 4
    with pytest.raises(ValueError, match="2 dims but 1 axes"):
        LeafSpec((2, 3), jnp.float32, ("batch",))


def test_documents_are_numbered_on_from_the_state():
    ctx = Context(
        positions=jnp.asarray([[0, 1, 0, 0], [7, 8, 0, 1]]),
        starts=jnp.asarray([[True, False, True, True], [False, False, True, True]]),
        valid=jnp.asarray([[True, True, True, False], [True, True, True, True]]),
    )
    documents, current = token_documents(jnp.asarray([4, 0]), ctx)
    assert documents.tolist() == [[5, 5, 6, -1], [0, 0, 1, 2]]
    assert current.tolist() == [6, 2]


def test_a_window_of_a_context_is_what_the_call_on_it_is_given():
    ctx = Context.of_documents(2, 5, token_ids=jnp.arange(10).reshape(2, 5), want_metrics=True)
    piece = ctx.window(1, 3)
    assert piece.positions.tolist() == [[1, 2], [1, 2]]
    assert piece.token_ids is not None and piece.token_ids.tolist() == [[1, 2], [6, 7]]
    assert not piece.starts.any() and piece.want_metrics


def test_overflow_is_an_error_that_names_the_rows():
    good = {"key": jnp.zeros((3, 2)), "overflow": jnp.zeros((3,), bool)}
    bad = good | {"overflow": jnp.asarray([False, True, True])}
    raise_on_overflow([{"mixer": good}, {"ffn": {}}])
    with pytest.raises(BadInput, match=r"state\[1\]\['mixer'\]: rows \[1, 2\] were given more"):
        raise_on_overflow([{"mixer": good}, {"mixer": bad}])
    with pytest.raises(BadInput, match=r"memory state: rows \[1, 2\]"):
        raise_on_overflow(bad)


def test_reset_writes_the_initial_state_not_zeros():
    class Sevens(Memory):
        def state_spec(self, batch, capacity):
            return {"seven": LeafSpec((batch, 2), jnp.float32, ("batch", None), fill=7)}

    memory = Sevens()
    state = {"seven": jnp.ones((3, 2))}
    after = memory.reset(state, jnp.asarray([True, False, True]), 1)
    assert np.asarray(after["seven"]).tolist() == [[7, 7], [1, 1], [7, 7]]
    assert memory.fork(after, jnp.asarray([1, 0]))["seven"].tolist() == [[1, 1], [7, 7]]
    with pytest.raises(ValueError, match="Sevens offers no rollback"):
        memory.rollback(state, 1)
    with pytest.raises(NotImplementedError, match="Sevens has no call"):
        memory(jnp.zeros((1, 1, 1)), state, Context.of_documents(1, 1))


def test_names_are_registered_once():
    with pytest.raises(ValueError, match="'window' is registered already"):
        register("window", AttentionConfig())
    assert {"attention", "window", "product_key"} <= set(REGISTRY)
