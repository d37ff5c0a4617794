"""What does not fit is refused, with what would."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from memtrain_kernels.lookup import (
    memory_topk,
    merge_row_gradients,
    product_key_lookup,
    product_key_topk,
    weighted_gather,
    weighted_gather_row_gradients,
)


Q, KEYS = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 9, 2, 8))
STORED = {"keys": KEYS.astype(jnp.int8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 0}, "top_k=0 must be between 1 and 9"),
        ({"top_k": 10}, "top_k=10 must be between 1 and 9"),
        ({"top_k": 2.0}, "top_k is 2.0: give an int"),
        ({"queries": Q.astype(int)}, "queries has dtype int32: give a floating dtype"),
        ({"queries": Q.astype(jnp.float8_e4m3fn)}, "queries has dtype float8_e4m3fn: give one of"),
        ({"queries": Q[0]}, r"queries has shape \(3, 4, 8\) and keys .* give \[B, T, H, D\]"),
        ({"queries": Q[:0]}, r"empty lookup: queries \(0, 3, 4, 8\)"),
        ({"queries": Q[..., :7]}, r"keys has shape .*: give keys of width 7"),
        ({"queries": Q[:, :, :3]}, "queries has 3 heads and keys 2: query heads must be a"),
        ({"keys": jnp.ones((3, 9, 2, 8))}, "keys has batch 3: give 1 or 2"),
        ({"keys": KEYS.astype(jnp.int16)}, "keys has dtype int16: give int8, float8_e4m3fn, "),
        (STORED, "keys of dtype int8 need key_scales"),
        ({"key_scales": jnp.ones(2)}, "key_scales are for int8 and float8 keys, not float32"),
        (STORED | {"key_scales": jnp.ones(3)}, r"key_scales has shape \(3,\): give \[2, 9, 2\]"),
        (STORED | {"key_scales": jnp.ones(2, int)}, "key_scales has dtype int32: give float32"),
        (STORED | {"key_scales": jnp.array([1, jnp.nan])}, "key_scales has nan: give finite"),
        (STORED | {"key_scales": jnp.array([1, 0.0])}, "key_scales has 0.0: give finite"),
        (STORED | {"key_scales": jnp.array([1, -2.0])}, "key_scales has -2.0: give finite"),
        ({"kv_positions": np.ones(9)}, "kv_positions has dtype float64: give int32"),
        ({"kv_positions": np.ones(8, int)}, r"kv_positions has shape \(8,\): give \[2, 9\] or"),
        ({"q_segments": np.ones((3, 3), int)}, r"q_segments has shape \(3, 3\): give \[2, 3\] or"),
        ({"mask_fn": "causal"}, "mask_fn is 'causal': give a module-level function"),
        ({"block_keys": 0}, "block_keys=0 must be at least 1"),
        ({"block_queries": -1}, "block_queries=-1 must be at least 1"),
    ],
)
def test_memory_topk(change, message):
    arguments: dict[str, Any] = {"queries": Q, "keys": KEYS, "top_k": 2} | change
    with pytest.raises(ValueError, match=message):
        memory_topk(**arguments)


def test_product_key_lookup():
    keys = jnp.zeros((2, 3, 5, 4))
    with pytest.raises(ValueError, match=r"queries has shape .* give \[\.\.\., 3, 2, 4\]"):
        product_key_lookup(jnp.zeros((7, 3, 4)), keys, 1)
    with pytest.raises(ValueError, match=r"half_keys has shape .* give \[2, H, N, D\]"):
        product_key_lookup(jnp.zeros((7, 3, 2, 4)), keys[0], 1)
    with pytest.raises(ValueError, match="top_k"):
        product_key_lookup(jnp.zeros((7, 3, 2, 4)), keys, 6)
    with pytest.raises(ValueError, match="queries"):
        product_key_lookup(jnp.zeros((7, 3, 2, 4), int), keys, 1)


def test_product_key_topk():
    with pytest.raises(ValueError, match="top_k=6 must be between 1 and the 5 half-keys"):
        product_key_topk(jnp.zeros(5), jnp.zeros(5), 6)
    with pytest.raises(ValueError, match=r"scores_2 has shape \(4,\): give that of scores_1, \(5,"):
        product_key_topk(jnp.zeros(5), jnp.zeros(4), 1)
    with pytest.raises(ValueError, match="scores_1 has dtype int32: give a floating dtype"):
        product_key_topk(jnp.zeros(5, int), jnp.zeros(5), 1)


TABLE, SLOTS, WEIGHTS, DY = (
    jnp.ones((5, 3)),
    jnp.zeros((4, 2), int),
    jnp.ones((4, 2)),
    jnp.ones((4, 3)),
)


@pytest.mark.parametrize(
    ("table", "slots", "weights", "message"),
    [
        (TABLE[0], SLOTS, WEIGHTS, r"table has shape \(3,\): give \[N, D\]"),
        (TABLE.astype(int), SLOTS, WEIGHTS, "table has dtype int32: give a floating dtype"),
        (TABLE, SLOTS[0], WEIGHTS, r"slots has shape \(2,\): give \[M, K\]"),
        (TABLE, SLOTS[:, :0], WEIGHTS[:, :0], r"slots has shape \(4, 0\): give \[M, K\], K at"),
        (TABLE, SLOTS.astype(float), WEIGHTS, "slots has dtype float32: give an integer dtype"),
        (TABLE, SLOTS, WEIGHTS[:, :1], r"weights has shape \(4, 1\): give that of slots, \(4, 2\)"),
        (TABLE, SLOTS, SLOTS, "weights has dtype int32: give a floating dtype"),
    ],
)
def test_weighted_gather(table, slots, weights, message):
    with pytest.raises(ValueError, match=message):
        weighted_gather(table, slots, weights)


def test_row_gradients():
    with pytest.raises(ValueError, match=r"dy has shape \(3, 3\): give \[4, D\]"):
        weighted_gather_row_gradients(SLOTS, WEIGHTS, DY[:3])
    with pytest.raises(ValueError, match="max_rows=0 must be at least 1"):
        weighted_gather_row_gradients(SLOTS, WEIGHTS, DY, max_rows=0)
    rows = weighted_gather_row_gradients(SLOTS + 7, WEIGHTS, DY)
    with pytest.raises(ValueError, match="num_rows=7 is too few: row 7 was touched"):
        rows.to_dense(7)
    with pytest.raises(ValueError, match="merge_row_gradients got no parts"):
        merge_row_gradients()
    narrow = weighted_gather_row_gradients(SLOTS, WEIGHTS, DY[:, :2])
    with pytest.raises(ValueError, match=r"widths \[2, 3\]: give parts of one table"):
        merge_row_gradients(rows, narrow)
