"""Every registered memory keeps every law."""

import jax
import numpy as np
import pytest
from flax import nnx

from memtrain.description import Dtypes
from memtrain.memory import REGISTRY, ProductKeyMemory
from memtrain.testing import LAWS, check_laws


TRANSITIONS = {
    "gated_delta",
    "gated_delta_channel",
    "linear_recurrence",
    "mamba1",
    "mamba2",
    "short_conv",
}


# One call for all laws: they share programs, and compiling those is what it costs.
@pytest.mark.full
@pytest.mark.parametrize("name", REGISTRY)
def test_every_law(name):
    assert len(jax.devices()) >= 8
    report = check_laws(REGISTRY[name])
    print(report)
    assert [o.law for o in report.outcomes] == list(LAWS)
    assert all(o.status == "holds" for o in report.outcomes)
    assert report["sharding"].notes == ["6 meshes"]
    assert ("no transitions" in report["context_parallel"].notes) == (name not in TRANSITIONS)


def test_another_seed():
    check_laws(REGISTRY["window"], laws=["split", "reset", "padding"], seed=1)


@pytest.mark.full
def test_exact_ties_are_broken_alike_in_every_cut():
    """Twin half-keys: every slot has another with exactly its score, also at the top-k's edge."""

    def make(dtypes: Dtypes, rngs: nnx.Rngs) -> ProductKeyMemory:
        memory = REGISTRY["product_key"](dtypes, rngs)
        assert isinstance(memory, ProductKeyMemory)
        keys = memory.keys[...]
        memory.keys.set_value(keys.at[:, :, 1::2].set(keys[:, :, ::2]))
        return memory

    memory = make(Dtypes(), nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (8, 21, 16))
    margin = np.asarray(memory.selection_margin(x, None, None))  # type: ignore[arg-type]
    assert (margin == 0).mean() > 0.5
    check_laws(make, laws=["split"])


@pytest.mark.slow
@pytest.mark.parametrize("name", REGISTRY)
def test_slow(name):
    report = check_laws(REGISTRY[name], slow=True)
    print(report)
    assert report["sharding"].notes == ["21 meshes"]
    assert all(o.status == "holds" for o in report.outcomes)
