"""Shapes in signatures are checked in tests (see conftest.py), and nowhere else."""

import subprocess
import sys

import jax.numpy as jnp
import jaxtyping
import pytest

from memtrain.memory.rope import apply_rope


def test_a_wrong_shape_is_refused():
    x = jnp.ones((2, 5, 3, 4))
    with pytest.raises(jaxtyping.TypeCheckError, match="positions"):
        apply_rope(x, jnp.zeros((2, 6), jnp.int32), 1e4)


def test_users_pay_nothing_for_it():
    program = (
        "import sys, memtrain.memory.rope as rope; "
        "print('beartype' in sys.modules, hasattr(rope.apply_rope, '__wrapped__'))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout == "False False\n", ended.stderr
