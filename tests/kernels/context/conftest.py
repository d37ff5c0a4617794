"""Lets the tests of this folder import their own helpers and attention's oracle."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "attention"))
