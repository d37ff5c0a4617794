"""Lets the tests of this folder import the decode tests' oracle and the emulator of Mosaic GPU."""

import sys
from pathlib import Path


for folder in ("decode", "attention_hopper"):
    sys.path.insert(0, str(Path(__file__).parent.parent / folder))
