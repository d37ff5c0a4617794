"""The grouped matrix product: rows sorted by group, one matrix a group."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from memtrain_kernels.announce import Record
from memtrain_kernels.grouped import ragged, reference, tiles
from memtrain_kernels.target import current_target


Backend = Literal["reference", "xla", "ragged"]
BACKENDS: tuple[str, ...] = get_args(Backend)
_MODULES = {"reference": reference, "xla": tiles, "ragged": ragged}
_record = Record("grouped_matmul")


def grouped_matmul(
    rows: Any,
    weights: Any,
    group_sizes: Any,
    *,
    operand_dtype: Any = None,
    out_dtype: Any = None,
    backend: Backend | None = None,
) -> Array:
    """out[i] = rows[i] @ weights[g] for the group g that row i is of (Gale et al. 2022,
    MegaBlocks, arXiv 2211.15841). Nothing is padded to a group's capacity and nothing is dropped.

    Args:
        rows: [N, D], those of group 0 first, then those of group 1, and so on.
        weights: [G, D, F].
        group_sizes: int32 [G], 0 or more. Rows after their sum are of no group: their results and
            gradients are 0, and no time is spent on them by "xla" and "ragged".
        operand_dtype: what products are taken of, in the backward too; the rows' unless given.
        out_dtype: of the result, the rows' unless given. Sums within a product are float32 or
            wider.
        backend: "xla" goes over tiles of rows in a loop; "ragged" is TPU's own product of ragged
            groups, and nothing for another device, where XLA makes rows x groups products of it;
            "reference" gathers each row's matrix. Chosen by the device unless given.
    Returns:
        [N, F]. Differentiable once, in reverse, in rows and weights; the weights' gradient is
        summed in float32 and has their dtype.
    Raises ValueError for shapes that do not fit, and where the backend does not serve the device.
    """
    rows, weights, sizes = jnp.asarray(rows), jnp.asarray(weights), jnp.asarray(group_sizes)
    if rows.ndim != 2 or weights.ndim != 3 or rows.shape[1] != weights.shape[1]:
        raise ValueError(
            f"rows {rows.shape} and weights {weights.shape}: they have to be [N, D] and [G, D, F]"
        )
    if sizes.shape != weights.shape[:1] or not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise ValueError(
            f"group_sizes is {sizes.dtype}{list(sizes.shape)}: it takes int32 [{len(weights)}]"
        )
    name, reason = backend_for(backend)
    _record.add(name, reason)
    operands = jnp.dtype(operand_dtype or rows.dtype)
    out = jnp.dtype(out_dtype or rows.dtype)
    return _product(rows, weights, sizes.astype(jnp.int32), name, operands, out)


def backend_for(backend: str | None = None) -> tuple[str, str]:
    """The backend that serves the current device, and why."""
    platform = current_target().platform
    if backend is None:
        if platform == "tpu":
            return "ragged", "TPU multiplies ragged groups itself"
        return "xla", f"tiles in a loop, on {platform}"
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: there are {', '.join(BACKENDS)}")
    if backend == "ragged" and platform != "tpu":
        raise ValueError(
            f"backend='ragged' on {platform}: XLA would multiply every row with every group's "
            "matrix; 'xla' fits"
        )
    return backend, "asked for"


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _product(rows, weights, sizes, backend, operands, out):
    wide = jnp.promote_types(operands, jnp.float32)
    got = _MODULES[backend].product(rows.astype(operands), weights.astype(operands), sizes, wide)
    return got.astype(out)


def _forward(rows, weights, sizes, backend, operands, out):
    # An empty array remembers the dtype that the rows' gradient must have.
    saved = rows.astype(operands), weights, sizes, jnp.zeros((), rows.dtype)
    return _product(rows, weights, sizes, backend, operands, out), saved


def _backward(backend, operands, out, saved, d_out):
    rows, weights, sizes, like = saved
    wide = jnp.promote_types(operands, jnp.float32)
    module, d_out = _MODULES[backend], d_out.astype(operands)
    transposed = weights.astype(operands).swapaxes(1, 2)
    d_rows = module.product(d_out, transposed, sizes, wide)
    d_weights = module.outer(rows, d_out, sizes, wide)
    no_gradient = np.zeros(sizes.shape, jax.dtypes.float0)
    return d_rows.astype(like.dtype), d_weights.astype(weights.dtype), no_gradient


_product.defvjp(_forward, _backward)
