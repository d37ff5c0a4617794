"""Calls compiled whole: op by op, compilation would take most of the tests' time."""

import jax


def compiled(function):
    """`jax.jit` without the optimisation of machine code, which takes half the time on CPU."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


call = compiled(lambda memory, x, state, ctx: memory(x, state, ctx))
"""memory(x, state, ctx)."""
