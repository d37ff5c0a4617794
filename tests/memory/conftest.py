"""Lets the tests of this folder import their oracles; products are exact to float32."""

import sys
from pathlib import Path

import jax
import pytest


sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield
