"""Keys sharded over 8 devices: the picks, ties and gradients of one device."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import lookup_oracle as oracle
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from memtrain_kernels.lookup import memory_topk, sharded_memory_topk


pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

S, BLOCK = 8 * 12, 4  # shares of 12 keys in three blocks; the blocks of one device are as long


def mesh_of(*sizes: int) -> Mesh:
    names = ("data", "memory")[-len(sizes) :]
    return Mesh(np.array(jax.devices()[:8]).reshape(sizes), names)


def sees_behind(q_pos, kv_pos, q_seg, kv_seg):
    return kv_pos < q_pos


@functools.cache
def programs(kind: str, check_vma: bool):
    """(sharded, on one device), each giving scores, indices, d_queries, d_keys."""
    mesh = mesh_of(8)
    mask_fn = None if kind == "default" else sees_behind
    arrays = {"default": (), "positions": (P(None, "memory"),) * 2}[kind]

    def named(tokens) -> dict[str, Any]:
        names = ("kv_positions", "kv_segments")[: len(tokens)]
        extra = {"q_positions": jnp.array([60, 200, 0, 130])} if tokens else {}
        return dict(zip(names, tokens, strict=True)) | extra

    def both(find, q, keys, weight):
        def weighed(q, keys):
            scores, indices = find(q, keys)
            # What was not seen has no gradient; a mean over the axis is what a loss is.
            return jnp.sum(jnp.where(indices < 0, 0, scores * weight)), (scores, indices)

        (_, found), grads = jax.value_and_grad(weighed, (0, 1), has_aux=True)(q, keys)
        return *found, *grads

    def shard(q, keys, *tokens):
        return sharded_memory_topk(
            q, keys, 5, axis_name="memory", mask_fn=mask_fn, block_keys=BLOCK, **named(tokens)
        )

    def sharded(q, keys, weight, *tokens):
        find = jax.shard_map(
            shard,
            mesh=mesh,
            in_specs=(P(), P(None, "memory"), *arrays),
            out_specs=P(),
            check_vma=check_vma,
        )
        return both(lambda q, keys: find(q, keys, *tokens), q, keys, weight)

    def single(q, keys, weight, *tokens):
        def find(q, keys):
            return memory_topk(q, keys, 5, mask_fn=mask_fn, block_keys=BLOCK, **named(tokens))

        return both(find, q, keys, weight)

    return jax.jit(sharded), jax.jit(single), mesh


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("kind", ["default", "positions"])
@pytest.mark.parametrize("ties", [True, False])
def test_the_same_as_on_one_device(kind, ties, check_vma):
    rng = np.random.default_rng(7)
    sharded, single, mesh = programs(kind, check_vma)
    values = rng.integers(-2, 3, (2, S, 2, 4)) if ties else rng.standard_normal((2, S, 2, 4))
    q = jnp.asarray(np.rint(3 * rng.standard_normal((2, 4, 4, 4))), jnp.float32)
    keys = jnp.asarray(values, jnp.float32)
    weight = jnp.asarray(rng.standard_normal((2, 4, 4, 5)), jnp.float32)
    positions = np.stack([rng.permutation(2 * S)[:S] for _ in range(2)])
    segments = rng.integers(-1, 2, (2, S))
    tokens = () if kind == "default" else (jnp.asarray(positions), jnp.asarray(segments))

    one = single(q, keys, weight, *tokens)
    many = sharded(q, jax.device_put(keys, NamedSharding(mesh, P(None, "memory"))), weight, *tokens)
    for name, ours, theirs in zip(("scores", "indices"), many, one, strict=False):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    oracle.close(many[2], one[2], 1e-6)
    oracle.close(many[3], one[3], 1e-6)
    assert many[3].sharding.is_equivalent_to(NamedSharding(mesh, P(None, "memory")), 4)

    q_pos = np.tile([60, 200, 0, 130] if tokens else np.arange(4), (2, 1))
    want = oracle.topk(
        q,
        keys,
        5,
        positions=(q_pos, positions if tokens else np.tile(np.arange(S), (2, 1))),
        segments=(np.zeros((2, 4), int), segments if tokens else np.zeros((2, S), int)),
        mask_fn=sees_behind if tokens else None,
    )
    oracle.close(many[0], want[0], 1e-6)
    np.testing.assert_array_equal(many[1], want[1])
    d_q, d_keys = oracle.topk_gradients(q, keys, want[1], weight)
    oracle.close(many[2], d_q, 1e-5)
    oracle.close(many[3], d_keys, 1e-5)
    if ties:
        scores = np.asarray(many[0])
        assert ((scores[..., 1:] == scores[..., :-1]) & np.isfinite(scores[..., 1:])).any()
    if tokens:
        assert (np.asarray(many[1]) == -1).any()


def test_queries_sharded_over_another_axis_and_more_picks_than_a_share_has():
    rng = np.random.default_rng(8)
    mesh = mesh_of(2, 4)
    q, keys = rng.integers(-2, 3, (6, 4)), rng.integers(-2, 3, (20, 4))
    scales = 2.0 ** rng.integers(-1, 2, 20)
    find = jax.jit(
        jax.shard_map(
            lambda q, keys, scales: sharded_memory_topk(
                q, keys, 9, axis_name="memory", key_scales=scales
            ),
            mesh=mesh,
            in_specs=(P("data"), P("memory"), P("memory")),
            out_specs=P("data"),
        )
    )
    arguments = (
        jnp.asarray(q, jnp.float32),
        jnp.asarray(keys, jnp.int8),
        jnp.asarray(scales, jnp.float32),
    )
    scores, indices = find(*arguments)
    want = oracle.topk(q[None, :, None], keys[None, :, None], 9, scales=scales.reshape(1, 20, 1))
    np.testing.assert_array_equal(scores, want[0][0, :, 0])
    np.testing.assert_array_equal(indices, want[1][0, :, 0])

    with pytest.raises(ValueError, match="top_k=21 must be between 1 and 20"):
        jax.shard_map(
            lambda q, keys: sharded_memory_topk(q, keys, 21, axis_name="memory"),
            mesh=mesh,
            in_specs=(P("data"), P("memory")),
            out_specs=P("data"),
        )(arguments[0], arguments[0][:1].repeat(20, 0))
