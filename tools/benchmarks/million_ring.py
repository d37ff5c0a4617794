"""One optimizer step with attention over all the tokens of a row, held to dense rows in float64.

The recipe's model reads one row of real text on its mesh; the loss is that of `--rows` sampled
tokens, so that what reaches the ring is known: of the sampled rows the output, and of every key and
value the gradient, are computed again in NumPy float64, all keys at once, from the queries, keys
and values that the model made. At 1,048,576 tokens that is 2.5 x 10^14 operations on the ring's
side: half an hour on two quiet cores.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from common import write


@dataclass(frozen=True)
class Options:
    recipe: tyro.conf.Positional[str] = "experiments/million_tokens.py:ring"
    tokens: int = 1_048_576
    rows: int = 64
    """Sampled query rows."""
    seed: int = 0
    set: tuple[str, ...] = ()
    out: Path | None = None


def main() -> None:
    options = tyro.cli(Options)
    from memtrain import runtime
    from memtrain.config import override
    from memtrain.recipe import load_recipe

    changes = (f"train.seq_len={options.tokens}", *options.set)
    experiment = override(load_recipe(options.recipe), changes)
    runtime.prepare(experiment.num_devices)

    from memtrain.data.pipeline import build_pipeline
    from memtrain.parallel.mesh import mesh_of
    from memtrain.train.feed import on_devices
    from memtrain.train.records import versions
    from memtrain.train.state import Plan

    config = experiment.train
    pipeline = build_pipeline(
        experiment.data, seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed
    )
    plan = Plan.of(experiment, pipeline.vocab_size, mesh_of(experiment.mesh))
    batch = next(pipeline.batches(0))
    assert config.batch_size == 1 and (batch.positions == np.arange(config.seq_len)).all()
    rng = np.random.default_rng(options.seed)
    sampled = np.sort(rng.choice(config.seq_len, options.rows, replace=False))
    sampled[-1] = config.seq_len - 1  # the last token sees them all
    weights = np.zeros_like(batch.loss_weights)
    weights[0, sampled] = 1
    batch = next(on_devices(iter([batch._replace(loss_weights=weights)]), plan.mesh))

    seconds, loss, norm, tapped = one_step(plan, batch)
    errors = compare(tapped, sampled)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{config.seq_len:,} tokens on mesh {dict(plan.mesh.shape)}, layout {plan.tokens.layout}")
    print(f"compiled in {seconds[0]:.0f} s, one step in {seconds[1]:.0f} s, loss {loss:.4f}")
    for name, error in errors.items():
        print(f"{name:<4} greatest error {error:.2e} of the greatest element")
    print(f"peak host memory {peak:.2f} GiB")
    results = {
        "tokens": config.seq_len,
        "mesh": dict(plan.mesh.shape),
        "layout": plan.tokens.layout.kind,
        "rows": sampled.tolist(),
        "seconds": {"compile": seconds[0], "step": seconds[1]},
        "loss": loss,
        "update_norm": norm,
        "errors": errors,
        "bound": 1e-4,
        "peak_host_gib": peak,
    }
    write(options.out, "million-ring", results, versions())
    if max(errors.values()) > 1e-4:
        raise SystemExit("million-ring: beyond the bound of 1e-4")


def one_step(plan: Any, batch: Any) -> tuple[tuple[float, float], float, float, dict[str, Any]]:
    """Seconds to compile and to run one update of the parameters, its loss, how far it moved them,
    and the full attention's operands, result and gradients, on the host in natural order."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import NamedSharding, PartitionSpec

    import memtrain.memory.attention as attention_memory
    from memtrain.memory.attention import Attention
    from memtrain.model.loss import cross_entropy_over_devices
    from memtrain.parallel.sharding import kernels_over
    from memtrain.train.step import arranged, context_of

    real = attention_memory.attention
    model_config = plan.experiment.model

    def loss_of(parameters: Any, probes: dict[str, Any], batch: Any) -> Any:
        taps: dict[str, Any] = {}

        def attention(q, k, v, **options):
            if options["spec"].window is not None:
                return real(q, k, v, **options)
            k, v = k + probes["dk"], v + probes["dv"]
            o = real(q, k, v, **options) + probes["do"]
            taps.update(q=q, k=k, v=v, o=o)
            return o

        attention_memory.attention = attention
        try:
            model = plan.skeleton.merge(parameters)
            ctx = context_of(batch, layout=plan.tokens.layout)
            hidden, _, _ = model(batch.tokens, None, ctx)
        finally:
            attention_memory.attention = real
        chunk, matmul = model_config.loss_chunk_tokens, model_config.dtypes.matmul
        loss = cross_entropy_over_devices(
            hidden, model.head(), batch.targets, batch.loss_weights, chunk, matmul
        )
        return loss / jnp.sum(batch.loss_weights), taps

    @jax.jit
    def step(state: Any, probes: dict[str, Any], batch: Any) -> Any:
        with kernels_over(plan.mesh, plan.tokens):
            batch = arranged(batch, plan)
            (loss, taps), (grads, at_probes) = jax.value_and_grad(
                loss_of, argnums=(0, 1), has_aux=True
            )(state.parameters, probes, batch)
        updates, _ = plan.optimizer.update(grads, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        return loss, optax.global_norm(updates), parameters, taps | at_probes

    mixers = [block.mixer.layer for block in plan.skeleton.merge(plan.skeleton.shapes).blocks]
    layer = next(m for m in mixers if isinstance(m, Attention) and m.config.window is None)
    shape = (1, plan.experiment.train.seq_len, layer.num_kv_heads, layer.head_dim)
    assert layer.num_heads == layer.num_kv_heads
    tokens = NamedSharding(plan.mesh, PartitionSpec(None, "context"))
    probes = {
        name: jax.jit(lambda: jnp.zeros(shape, jnp.float32), out_shardings=tokens)()
        for name in ("do", "dk", "dv")
    }
    state = plan.init()
    begin = time.perf_counter()
    compiled = step.lower(state, probes, batch).compile()
    compile_seconds = time.perf_counter() - begin
    temporary = compiled.memory_analysis().temp_size_in_bytes / 2**30
    print(
        f"compiled in {compile_seconds:.0f} s: {temporary:.2f} GiB of temporaries on each device",
        flush=True,
    )
    begin = time.perf_counter()
    loss, norm, parameters, taps = jax.block_until_ready(compiled(state, probes, batch))
    seconds = time.perf_counter() - begin
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in parameters.values())
    found = {
        name: plan.tokens.layout.restore(np.asarray(tap))[0].astype(np.float32)
        for name, tap in taps.items()
    }
    return (compile_seconds, seconds), float(loss), float(norm), found


def compare(tapped: dict[str, np.ndarray], sampled: np.ndarray) -> dict[str, float]:
    """Greatest errors against dense causal attention in float64, of the greatest element."""
    q, k, v, o, do = (tapped[name] for name in ("q", "k", "v", "o", "do"))
    length, heads, dim = q.shape
    others = np.ones(length, bool)
    others[sampled] = False
    assert not np.abs(do[others]).max(), "a token that was not sampled has a gradient"
    want_o = np.zeros((len(sampled), heads, dim))
    want = {"dk": np.zeros(k.shape), "dv": np.zeros(v.shape)}
    for head in range(heads):
        keys, values = k[:, head].astype(np.float64), v[:, head].astype(np.float64)
        for n, row in enumerate(sampled):
            query, cotangent = (x[row, head].astype(np.float64) for x in (q, do))
            scores = keys[: row + 1] @ query * dim**-0.5
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            want_o[n, head] = weights @ values[: row + 1]
            slopes = weights * (values[: row + 1] @ cotangent - want_o[n, head] @ cotangent)
            want["dk"][: row + 1, head] += np.outer(slopes, query) * dim**-0.5
            want["dv"][: row + 1, head] += np.outer(weights, cotangent)
    # Gradients of a mean loss over a million keys are small numbers: measured by their greatest.
    error = lambda got, want: float(np.abs(got - want).max() / np.abs(want).max())  # noqa: E731
    return {"o": error(o[sampled], want_o)} | {n: error(tapped[n], want[n]) for n in want}


if __name__ == "__main__":
    main()
