"""The kernels' own bodies, run by the emulator, against their twins: barriers, buffers, indices."""

from typing import NamedTuple

import emulator
import hopper_oracle as oracle
import jax
import jax.numpy as jnp
import layouts
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from memtrain_kernels import AttentionSpec
from memtrain_kernels.attention.hopper import kernels, plan, twins


class Case(NamedTuple):
    head_dim: int
    spec: AttentionSpec
    layout: str
    T: int
    S: int
    dtype: str = "float32"


CASES = {
    "head_dim 64": Case(64, AttentionSpec(causal=False), "default", 130, 650),
    "head_dim 128": Case(
        128, AttentionSpec(window=90, sink_tokens=3, prefix=4, soft_cap=3.0), "packed", 400, 400
    ),
    "head_dim 256": Case(256, AttentionSpec(causal=False), "shuffled", 130, 200),
}


def run(case: Case, engine) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    B, H, K, D = 1, 2, 1, case.head_dim
    T, S = plan.padded_length(case.T), plan.padded_length(case.S)

    def draw(*shape: int, dtype: str = case.dtype) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    q, k, v, do = draw(B, T, H, D), draw(B, S, K, D), draw(B, S, K, D), draw(B, T, H, D)
    lse2, delta = draw(B, H, T, dtype="float32"), draw(B, H, T, dtype="float32")
    lse2 = lse2.at[:, :, 5].set(jnp.inf) + 8
    _, given = layouts.tokens(case.layout, B, case.T, case.S)
    given = (None if x is None else jnp.asarray(x) for x in given)
    tokens = plan.make_tokens(case.T, case.S, *given)
    cut = plan.make_plan(q, k, tokens.q_pos.shape[0], case.spec)
    by_queries, by_keys = plan.tables_of_queries, plan.tables_of_keys
    blocks = plan.FORWARD[D]
    o, lse = engine.forward(cut, blocks, q, k, v, by_queries(cut, blocks, tokens))
    arrays = (q, k, v, do, lse2, delta)
    blocks = plan.DQ[D]
    dq = engine.dq(cut, blocks, *arrays, by_queries(cut, blocks, tokens))
    blocks = plan.DKV[D]
    dk, dv = engine.dkv(cut, blocks, *arrays, by_keys(cut, blocks, tokens))
    return {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


# More tiles than buffers everywhere, so that every buffer is used again.
@pytest.mark.parametrize(
    "name",
    ["head_dim 64", pytest.param("head_dim 128", marks=pytest.mark.slow), "head_dim 256"],
)
def test_kernel_bodies_do_as_their_twins(name: str) -> None:
    case = CASES[name]
    theirs = jax.jit(lambda: run(case, twins))()
    with emulator.emulated():
        ours = run(case, kernels)
    for what, value in ours.items():
        oracle.close(value, theirs[what], 2e-6)


@pytest.mark.parametrize("left_out", ["barrier_wait", "barrier_arrive"])
def test_a_missing_barrier_is_noticed(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(64, AttentionSpec(), "default", 128, 128)
    theirs = jax.jit(lambda: run(case, twins))()
    with (
        emulator.emulated(),
        monkeypatch.context() as patch,
        pytest.raises(AssertionError),
    ):
        real = getattr(plgpu, left_out)
        skipped = lambda barrier: None if emulator.warpgroup() == 1 else real(barrier)  # noqa: E731
        patch.setattr(plgpu, left_out, skipped)
        patch.setattr(emulator, "PATIENCE_S", 1)
        for what, value in run(case, kernels).items():
            oracle.close(value, theirs[what], 2e-6)
