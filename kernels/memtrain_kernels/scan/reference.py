"""The gated delta rule token by token, as it is defined: for single tokens, and to compare with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from memtrain_kernels.scan.arguments import Run


def token_by_token(run: Run, state: Array) -> tuple[Array, Array]:
    """Outputs [B, T, H, V] and the state after, [B, H, K, V]."""
    repeats = run.value.shape[2] // run.query.shape[2]
    tokens = {
        "q": jnp.repeat(run.query, repeats, axis=2),
        "k": jnp.repeat(run.key, repeats, axis=2),
        "v": run.value,
        "decay": _column(jnp.exp(run.log_decay)),
        "starts": run.starts,
    }
    if run.erase is not None:
        tokens["e"] = _column(run.erase) * tokens["k"]
    if run.query.shape[1] == 1:
        state, out = _step(state, jax.tree.map(lambda x: x[:, 0], tokens))
        return out[:, None], state
    by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    state, out = lax.scan(_step, state, by_time)
    return jnp.moveaxis(out, 0, 1), state


def _step(S_BHKV: Array, token: dict[str, Array]) -> tuple[Array, Array]:
    begun = token["starts"][:, None, None, None]
    S_BHKV = jnp.where(begun, 0, token["decay"][..., None] * S_BHKV)
    new_BHV = token["v"]
    if "e" in token:
        # Products and sums in place of matrix products, which would round on an accelerator.
        new_BHV = new_BHV - jnp.sum(token["e"][..., None] * S_BHKV, axis=2)
    S_BHKV = S_BHKV + token["k"][..., None] * new_BHV[:, :, None]
    return S_BHKV, jnp.sum(token["q"][..., None] * S_BHKV, axis=2)


def _column(x: Array) -> Array:
    """[B, T, H, K or 1]."""
    return x if x.ndim == 4 else x[..., None]
