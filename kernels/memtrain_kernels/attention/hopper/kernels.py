"""The kernels by name, as `attend` calls them. Importing this imports Mosaic GPU."""

from __future__ import annotations

import jax

from memtrain_kernels.attention.hopper import dkv as dkv_whole
from memtrain_kernels.attention.hopper import dkv_split
from memtrain_kernels.attention.hopper.dq import dq
from memtrain_kernels.attention.hopper.forward import forward
from memtrain_kernels.attention.hopper.plan import Blocks, Plan


__all__ = ["dkv", "dq", "forward"]


def dkv(plan: Plan, blocks: Blocks, *arrays) -> tuple[jax.Array, jax.Array]:
    """dk, dv [B, S, K, D]: by the kernel whose registers suffice for head_dim."""
    module = dkv_split if plan.D > 128 else dkv_whole
    return module.dkv(plan, blocks, *arrays)
