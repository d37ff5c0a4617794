"""The state that decoding needs, as JSON: each leaf's shape in terms of batch and capacity."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from memtrain.memory.protocol import LeafSpec
from memtrain.model.ablation import layer_label
from memtrain.model.language_model import full_pattern
from memtrain.model.unstacked import Unstacked


# Sizes at which specs are compared. Nothing is allocated; primes are not met by accident.
_BATCH, _CAPACITY = 7919, 1_299_709_000_003


def cache_spec(model: Unstacked) -> dict[str, Any]:
    """For every layer and place: the leaves of its state and the bytes that they take.

    A dimension is a number, "batch", "capacity", or "min(capacity, n)" for a ring of n slots.
    bytes_per_token is what a token of one sequence adds; bytes_per_sequence what a sequence takes
    however long it is (rings full).
    """
    specs = {
        "large": model.state_spec(_BATCH, _CAPACITY),
        "more": model.state_spec(_BATCH, 2 * _CAPACITY),
        "small": model.state_spec(_BATCH, 1),
    }
    pattern = full_pattern(model.body.config)
    places = []
    for index, memories in enumerate(specs["large"]):
        for place in memories:
            leaves = {
                name: _leaf(*(_flat(specs[size][index][place])[name] for size in specs))
                for name in _flat(memories[place])
            }
            places.append(
                {
                    "layer": index,
                    "place": place,
                    "memory": layer_label(getattr(pattern[index % len(pattern)], place)),
                    "leaves": leaves,
                    "bytes_per_token": sum(leaf["bytes_per_token"] for leaf in leaves.values()),
                    "bytes_per_sequence": sum(
                        leaf["bytes_per_sequence"] for leaf in leaves.values()
                    ),
                }
            )
    return {
        "places": places,
        "bytes_per_token": sum(place["bytes_per_token"] for place in places),
        "bytes_per_sequence": sum(place["bytes_per_sequence"] for place in places),
    }


def _flat(spec: Any, prefix: str = "") -> dict[str, LeafSpec]:
    """Leaves of nested dicts and lists by dotted name."""
    if isinstance(spec, LeafSpec):
        return {prefix: spec}
    items = spec.items() if isinstance(spec, dict) else enumerate(spec)
    return {
        name: leaf
        for key, inner in items
        for name, leaf in _flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _leaf(large: LeafSpec, more: LeafSpec, small: LeafSpec) -> dict[str, Any]:
    shape = [_dim(*sizes) for sizes in zip(large.shape, more.shape, small.shape, strict=True)]
    itemsize = jnp.dtype(large.dtype).itemsize
    fixed = [_fixed(dim) for dim in shape]
    per_sequence = math.prod(fixed) * itemsize
    grows = "capacity" in shape
    return {
        "shape": shape,
        "dtype": jnp.dtype(large.dtype).name,
        "axes": list(large.axes),
        "growth": large.growth,
        "residency": large.residency,
        "fill": large.fill,
        "bytes_per_token": per_sequence if grows else 0,
        "bytes_per_sequence": 0 if grows else per_sequence,
    }


def _dim(large: int, more: int, small: int) -> int | str:
    if large == _BATCH:
        return "batch"
    if large == _CAPACITY and more == 2 * _CAPACITY:
        return "capacity"
    if large == more == small:
        return large
    if large == more and small == 1:
        return f"min(capacity, {large})"
    raise ValueError(f"a dimension of {small}, {large}, {more} is no known function of capacity")


def _fixed(dim: int | str) -> int:
    if isinstance(dim, int):
        return dim
    return int(dim[len("min(capacity, ") : -1]) if dim.startswith("min") else 1
