"""`config.json`, read key by key: what nobody asked for is refused by name in the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memtrain.errors import BadInput


INERT = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "max_position_embeddings",
        "model_type",
        "pad_token_id",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Without effect on what a model computes: where it comes from, how it is drawn at random or kept,
what a tokenizer or a generation loop makes of it. `max_position_embeddings` is how long its texts
were; phases of the plain rotary embedding go on after it."""

_REQUIRED = object()


class Keys:
    """The keys of one config. Raises BadInput for what is missing, of another type or unknown."""

    def __init__(self, content: Mapping[str, Any], source: str):
        self.content, self.source = content, source
        self._left = set(content) - INERT

    def has(self, name: str) -> bool:
        """Whether the key is there, with anything but null."""
        return self.content.get(name) is not None

    def _take(self, name: str, default: Any) -> Any:
        self._left.discard(name)
        value = self.content.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise BadInput(f"{self.source}: {name} is missing")
        return default

    def integer(self, name: str, default: Any = _REQUIRED, *, least: int = 1) -> int:
        value = self._take(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise BadInput(f"{self.source}: {name}={value!r}: expected a whole number")
        if value < least:
            raise BadInput(f"{self.source}: {name}={value}: it takes {least} or more")
        return value

    def integer_or_null(self, name: str, default: int) -> int | None:
        """Where null has a meaning of its own, and is not the default."""
        if name in self.content and self.content[name] is None:
            self._left.discard(name)
            return None
        return self.integer(name, default)

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        value = self._take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadInput(f"{self.source}: {name}={value!r}: expected a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._take(name, default)
        if not isinstance(value, bool):
            raise BadInput(f"{self.source}: {name}={value!r}: expected true or false")
        return value

    def items(self, name: str, default: Any = _REQUIRED) -> list[Any]:
        value = self._take(name, default)
        if not isinstance(value, list):
            raise BadInput(f"{self.source}: {name}={value!r}: expected a list")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        value = self._take(name, {})
        if not isinstance(value, dict):
            raise BadInput(f"{self.source}: {name}={value!r}: expected an object")
        return value

    def must_be(self, name: str, *allowed: Any, default: Any = None) -> None:
        """Refuses a key that is neither left out (or null) nor of one of these values.

        default: what a left out key means to its architecture; one of `allowed` unless given.
        """
        value = self._take(name, allowed[0] if default is None else default)
        if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
            names = " or ".join(repr(a) for a in allowed)
            raise BadInput(
                f"{self.source}: {name}={value!r} has no counterpart in memtrain, which knows "
                f"{names} only"
            )

    def inert(self, *names: str) -> None:
        """Keys that change nothing in what this architecture computes."""
        self._left.difference_update(names)

    def done(self) -> None:
        """Refuses every key that was not asked for; a null says nothing."""
        rest = sorted(name for name in self._left if self.content[name] is not None)
        if rest:
            given = ", ".join(f"{name}={self.content[name]!r}" for name in rest)
            raise BadInput(
                f"{self.source}: memtrain does not know what {given} would change in a "
                f"{self.content['model_type']}: take it out if it changes nothing"
            )


def rope(keys: Keys, fraction: float = 1.0) -> tuple[float, float]:
    """(theta, the fraction of a head's channels that is rotated) of the plain rotary embedding.

    They are in `rope_parameters` (since transformers 5) or at the top (before), or in both.
    Raises BadInput for every other kind: scaled, per layer.
    """
    inner = Keys({"model_type": "rope"} | keys.mapping("rope_parameters"), keys.source)
    inner.source = f"{keys.source}: rope_parameters"
    for name in ("rope_type", "type"):
        inner.must_be(name, "default")
    if keys.has("rope_scaling"):
        scaling = keys.mapping("rope_scaling")
        if scaling.get("rope_type", scaling.get("type")) != "default" or len(scaling) > 1:
            raise BadInput(
                f"{keys.source}: rope_scaling={scaling!r} has no counterpart in memtrain, whose "
                "rotary embedding is the plain one"
            )
    keys.inert("rope_scaling")
    found = []
    for name, default in (("rope_theta", 10_000.0), ("partial_rotary_factor", fraction)):
        top = keys.number(name, default)
        value = inner.number(name, top)
        if keys.has(name) and top != value:
            raise BadInput(f"{keys.source}: {name} is {top} and, in rope_parameters, {value}")
        found.append(value)
    inner.done()
    return found[0], found[1]
