"""`--sweep KEY=V1,V2,...`: the same plan with one field at several values."""

from __future__ import annotations

import dataclasses

from memtrain.config import Experiment, override
from memtrain.errors import BadInput
from memtrain.overrides import leaf_keys


@dataclasses.dataclass(frozen=True)
class Sweep:
    key: str
    values: tuple[str, ...]
    points: tuple[Experiment, ...]


def parse_sweep(experiment: Experiment, text: str) -> Sweep:
    """ "train.seq_len=8192,32768"; the section may be left out where only one has such a field.

    Raises BadInput where the key is unknown or a value cannot be read.
    """
    key, equals, listed = text.partition("=")
    key = key.strip()
    values = tuple(value.strip() for value in listed.split(",") if value.strip())
    if not equals or not key or not values:
        raise BadInput(f"--sweep {text!r}: expected KEY=V1,V2,..., as in train.seq_len=8192,32768")
    if "." not in key:
        found = [
            leaf
            for leaf in leaf_keys(experiment)
            if leaf.count(".") == 1 and leaf.endswith(f".{key}")
        ]
        key = found[0] if len(found) == 1 else key
    points = tuple(override(experiment, [f"{key}={value}"]) for value in values)
    return Sweep(key, values, points)
