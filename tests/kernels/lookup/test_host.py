"""Tables in host memory give what they give in a device's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from memtrain_kernels import is_on_host, rows_of, weighted_gather, with_rows


HOST = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bag_of_a_table_in_host_memory(dtype):
    rng = np.random.default_rng(3)
    table = jnp.asarray(rng.normal(size=(20, 6)), dtype)
    slots = rng.integers(-1, 20, (7, 11)).astype(np.int32)
    weights = jnp.asarray(rng.normal(size=(7, 11)), jnp.float32)
    dy = rng.normal(size=(7, 6)).astype(np.float32)

    @jax.jit
    def both(table, weights):
        y = lambda w: weighted_gather(table, slots, w, table_gradient=False)  # noqa: E731
        out, pull = jax.vjp(y, weights)
        return out, pull(jnp.asarray(dy, out.dtype))[0]

    out, d_weights = both(jax.device_put(table, HOST), weights)
    assert not is_on_host(out) and not is_on_host(d_weights)
    rows = np.where(slots[..., None] < 0, 0, np.asarray(table, np.float64)[slots])
    wanted = np.einsum("mk,mkd->md", np.asarray(weights, np.float64), rows)
    exact = 2e-2 if dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted, atol=exact * 4)
    near = np.asarray(jnp.asarray(dy, dtype), np.float64)
    np.testing.assert_allclose(d_weights, np.einsum("md,mkd->mk", near, rows), atol=exact)


def test_rows_are_read_and_written_where_they_are():
    table = np.arange(12.0, dtype=np.float32).reshape(6, 2)
    ids, rows = np.int32([4, 0, 9]), np.full((3, 2), -1, np.float32)

    @jax.jit
    def step(table):
        return rows_of(table, jnp.asarray(ids[:2])), with_rows(
            table, jnp.asarray(ids), jnp.asarray(rows)
        )

    wanted = table.copy()
    wanted[[4, 0]] = -1
    for place in (HOST, SingleDeviceSharding(jax.devices()[0])):
        read, after = step(jax.device_put(table, place))
        np.testing.assert_array_equal(read, table[[4, 0]])
        np.testing.assert_array_equal(after, wanted)
        assert after.sharding.memory_kind == place.memory_kind and not is_on_host(read)
