"""Lets the tests of this folder import its oracle, and the one of the other backends."""

import sys
from pathlib import Path


here = Path(__file__).parent
sys.path[:0] = [str(here), str(here.parent / "attention")]
