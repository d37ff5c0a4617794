"""A kernel that XLA cannot look into runs on each device's own rows and heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from memtrain_kernels import AttentionSpec, attention, partitioned
from memtrain_kernels.attention import backends, xla
from memtrain_kernels.partition import is_told


pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


@pytest.fixture
def shapes_seen(monkeypatch):
    """Takes "xla" for a kernel that XLA cannot split, and tells what each device was given."""
    seen = []

    def attend(q, k, v, *rest):
        seen.append((q.shape, k.shape, None if rest[2] is None else rest[2].shape))
        return xla.attend(q, k, v, *rest)

    real = backends.backend_module
    module = type("Module", (), {"CAPABILITIES": xla.CAPABILITIES, "attend": staticmethod(attend)})
    monkeypatch.setattr(backends, "backend_module", lambda n: module if n == "xla" else real(n))
    monkeypatch.setattr(backends, "_OPAQUE", ("xla",))
    return seen


@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "expected"),
    [
        (4, 4, 2, ((1, 24, 2, 8), (1, 24, 1, 8), (1, 24))),
        (2, 4, 4, ((1, 24, 2, 8), (1, 24, 2, 8), (1, 24))),  # fsdp does not divide the rows
        (4, 4, 1, ((1, 24, 2, 8), (1, 24, 1, 8), (1, 24))),  # one key head is on every device
        (4, 6, 3, ((1, 24, 6, 8), (1, 24, 3, 8), (1, 24))),  # tensor does not divide the heads
    ],
)
def test_each_device_gets_its_rows_and_heads(shapes_seen, rows, heads, kv_heads, expected):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((rows, 24, h, 8)), jnp.float32)
        for h in (heads, kv_heads, kv_heads)
    )
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (rows, 24)), axis=1), jnp.int32)

    def loss(q, k, v, segments):
        out, lse = attention(
            q,
            k,
            v,
            spec=AttentionSpec(window=7),
            q_segments=segments,
            kv_segments=segments,
            return_lse=True,
            backend="xla",
        )
        return jnp.sum(jnp.sin(out)) + jnp.sum(lse)

    whole = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v, segments)
    assert shapes_seen[-1][0] == q.shape

    def split(*arrays):
        with partitioned(mesh, batch=("data", "fsdp"), heads=("tensor",)):
            return jax.value_and_grad(loss, (0, 1, 2))(*arrays)

    rule = NamedSharding(mesh, P("data"))
    parts = jax.jit(split, in_shardings=rule)(q, k, v, segments)
    assert shapes_seen[-1] == expected
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_inside_a_shard_map_over_some_axes_the_rest_is_split(shapes_seen):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "context"))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 24, 2, 8)), jnp.float32)

    def own_part(x):
        with partitioned(mesh, batch=("data",)):
            return attention(x, x, x, backend="xla")

    part = P(None, "context")
    run = jax.shard_map(
        own_part, mesh=mesh, in_specs=part, out_specs=part, axis_names={"context"}, check_vma=False
    )
    out = jax.jit(run)(x)
    assert shapes_seen[-1][0] == (2, 6, 2, 8)
    cut = [attention(c, c, c, backend="reference") for c in jnp.split(x, 4, axis=1)]
    np.testing.assert_allclose(out, jnp.concatenate(cut, axis=1), atol=1e-5)


def test_axes_that_are_not_there_are_refused():
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    for axes, words in (
        ({"batch": ("dta",)}, "mesh axis 'dta': the mesh has data"),
        ({"batch": ("data",), "heads": ("data",)}, "mesh axis 'data' splits several of rows"),
    ):
        with pytest.raises(ValueError, match=words), partitioned(mesh, **axes):
            pass


def test_what_the_program_does_not_say_is_said(shapes_seen):
    assert not is_told()
    assert "gathered: there are several devices" in backends.resolve_backend("xla")[1]
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    with partitioned(mesh, batch=("data",)):
        assert is_told()
        assert "gathered" not in backends.resolve_backend("xla")[1]

    def inside(x):
        assert is_told()  # a device's own share already
        return x

    jax.shard_map(inside, mesh=mesh, in_specs=P("data"), out_specs=P("data"))(jnp.ones(8))
