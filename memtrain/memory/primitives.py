"""The two layers that everything is made of: a matrix product and a norm."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from memtrain.description import Dtypes


MATMUL = "matmul"
"""Name of the results of matrix products, for policies of rematerialisation."""


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dense(x: Array, w: Array, matmul: Any, compute: Any) -> Array:
    """x @ w with operands in `matmul` dtype, also in the backward, and a result in `compute`.

    The backward's operands are rounded too: autodiff would mix a wide cotangent with a narrow
    operand, which no hardware multiplies at the narrow rate. The weight's gradient is float32.
    """
    return jnp.matmul(x.astype(matmul), w.astype(matmul), preferred_element_type=compute)


def _dense_forward(x, w, matmul, compute):
    # Empty arrays remember the dtypes that the gradients must have.
    return dense(x, w, matmul, compute), (x.astype(matmul), w, jnp.zeros((), x.dtype))


def _dense_backward(matmul, compute, saved, dy):
    x, w, like = saved
    dy = dy.astype(matmul)
    dx = jnp.matmul(dy, w.astype(matmul).T, preferred_element_type=jnp.float32)
    # Not reshaped to one row of tokens: rows and tokens that are sharded would be gathered for it.
    tokens = tuple(range(x.ndim - 1))
    dw = jnp.tensordot(x, dy, axes=(tokens, tokens), preferred_element_type=jnp.float32)
    return dx.astype(like.dtype), dw.astype(w.dtype)


dense.defvjp(_dense_forward, _dense_backward)


class Linear(nnx.Module):
    """y = x W, no bias. `axes` are the logical axes of W's two dimensions."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        axes: tuple[str | None, str | None],
        dtypes: Dtypes,
        rngs: nnx.Rngs,
        scale: float = 1.0,
    ):
        std = scale * in_dim**-0.5
        draw = jax.random.truncated_normal(rngs.params(), -3, 3, (in_dim, out_dim), jnp.float32)
        self.weight = nnx.Param((std * draw).astype(dtypes.params), logical_axes=axes)
        self.dtypes = dtypes

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch E"]:
        matmul, compute = jnp.dtype(self.dtypes.matmul), jnp.dtype(self.dtypes.compute)
        # Named for remat="dots": policies by primitive do not look into a custom gradient.
        return checkpoint_name(dense(x, self.weight[...], matmul, compute), MATMUL)


def rms_normalize(x: Array, epsilon: float = 1e-6) -> Array:
    """x / rms(x) over the last dimension, in float32 (Zhang and Sennrich 2019)."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)


class RMSNorm(nnx.Module):
    """Root-mean-square norm with a learned scale.

    epsilon: added to the mean square.
    groups: so many runs of the width, each normed by itself.
    """

    def __init__(self, dim: int, *, dtypes: Dtypes, epsilon: float = 1e-6, groups: int = 1):
        self.scale = nnx.Param(jnp.ones((dim,), dtypes.params), logical_axes=(None,))
        self.dtypes, self.epsilon, self.groups = dtypes, epsilon, groups

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        runs = x.reshape(*x.shape[:-1], self.groups, -1) if self.groups > 1 else x
        y = rms_normalize(runs, self.epsilon).reshape(x.shape)
        return (y * self.scale[...].astype(jnp.float32)).astype(self.dtypes.compute)
