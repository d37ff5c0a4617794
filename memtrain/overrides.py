"""`key=value` overrides: text from the command line, typed by the annotations of the fields.

A key is a path of field names and tuple indices, as in model.pattern.0.mixer.window. How a value of
each type is written is told in docs/configuration.md.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from memtrain.errors import BadInput
from memtrain.schema import (
    checked,
    class_named,
    construct,
    decode,
    describe_type,
    field_types,
    freeze,
    is_section,
    item_type,
    join,
    members,
    sections,
    unknown_key,
)


_NULL = ("null", "none")
_BOOLS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}


def override[T](config: T, assignments: Sequence[str]) -> T:
    """`config` with every `key=value` applied at once, in order: a later one wins over an earlier.

    The checks of the dataclasses see the result only, never a half-applied state. Raises `BadInput`
    for an unknown key (naming the nearest) and for text that its type cannot be read from.
    """
    root = _Change()
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise BadInput(
                f"override {assignment!r}: expected key=value, as in train.num_steps=100"
            )
        node = root
        for part in key.strip().split("."):
            node = node.children.setdefault(part, _Change())
        node.text, node.children = text, {}
    return _apply(config, type(config), root, "", config)


def leaf_keys(config: Any) -> list[str]:
    """The dotted keys of all fields that hold no further dataclass, in declaration order."""
    keys: list[str] = []

    def walk(value: Any, where: str) -> None:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            for field in dataclasses.fields(value):
                walk(getattr(value, field.name), join(where, field.name))
        elif isinstance(value, tuple) and any(dataclasses.is_dataclass(v) for v in value):
            for index, item in enumerate(value):
                walk(item, join(where, str(index)))
        else:
            keys.append(where)

    walk(config, "")
    return keys


@dataclasses.dataclass
class _Change:
    """What the assignments ask of one place: a new text, and then changes below it."""

    text: str | None = None
    children: dict[str, _Change] = dataclasses.field(default_factory=dict)


def _apply(value: Any, declared: Any, change: _Change, where: str, root: Any) -> Any:
    if change.text is not None:
        value = _parse(change.text, declared, where)
    if not change.children:
        return value
    if value is None:
        value = _default_section(declared, where, next(iter(change.children)))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = field_types(type(value))
        for key, child in change.children.items():
            if key not in hints:
                last = key
                while child.children:
                    last, child = next(iter(child.children.items()))
                leaves = [leaf for leaf in leaf_keys(root) if leaf.rpartition(".")[2] == last]
                raise unknown_key(key, list(hints), where, leaves or leaf_keys(root))
        changed = {
            key: _apply(getattr(value, key), hints[key], child, join(where, key), root)
            for key, child in change.children.items()
        }
        return checked(lambda: dataclasses.replace(value, **changed), where)
    if isinstance(value, tuple | list):
        items = list(value)
        for key, child in change.children.items():
            if not key.isdecimal() or int(key) >= len(items):
                raise BadInput(
                    f"unknown key {join(where, key)!r}: {where!r} is a list of {len(items)}, "
                    f"counted from 0"
                )
            item = item_type(declared, int(key), len(items))
            items[int(key)] = _apply(items[int(key)], item, child, join(where, key), root)
        return type(value)(items)
    if isinstance(value, Mapping):
        inner = next((get_args(m)[1] for m in members(declared) if len(get_args(m)) == 2), Any)
        return dict(value) | {
            key: _apply(value.get(key), inner, child, join(where, key), root)
            for key, child in change.children.items()
        }
    below = join(where, next(iter(change.children)))
    raise BadInput(
        f"unknown key {below!r}: {where!r} is {describe_type(declared)} and has no parts"
    )


def _default_section(declared: Any, where: str, child: str) -> Any:
    """The section with its defaults, where there is none yet and one of its fields is set."""
    bases = sections(declared)
    if len(bases) != 1 or not dataclasses.is_dataclass(bases[0]):
        what = f"is null; set {where}=TYPE first" if bases else "has no parts"
        raise BadInput(f"unknown key {join(where, child)!r}: {where!r} {what}")
    return construct(bases[0], {}, where)


def _parse(text: str, declared: Any, where: str) -> Any:
    """The value that a text on the command line stands for, as the annotation says."""
    several = members(declared)
    if type(None) in several and text.strip().lower() in _NULL:
        return None
    # str takes any text, so it is asked last.
    others = sorted((m for m in several if m is not type(None)), key=lambda m: m in (str, Path))
    for member in others:
        try:
            return _parse_one(text if member is str else text.strip(), member, declared, where)
        except BadInput:
            if len(others) == 1:
                raise
    raise _unreadable(where, declared, text)


def _parse_one(text: str, annotation: Any, declared: Any, where: str) -> Any:
    origin = get_origin(annotation)
    if annotation is str:
        return text
    if annotation is bool and text.lower() in _BOOLS:
        return _BOOLS[text.lower()]
    if annotation in (int, float):
        number = _number(text, annotation)
        if number is not None:
            return number
    elif origin is Literal:
        choice = next((c for c in get_args(annotation) if str(c) == text), text)
        return decode(choice, annotation, where)
    elif annotation in (tuple, list) or origin in (tuple, list):
        if text.startswith("["):
            return decode(_json(text, where), annotation, where)
        parts = [part.strip() for part in text.split(",")] if text else []
        if parts and not parts[-1]:  # A comma at the end, as in "a.txt,"
            parts.pop()
        args = get_args(annotation)
        if origin is tuple and args and args[-1] is not Ellipsis and len(args) != len(parts):
            raise _unreadable(where, annotation, text)
        items = (item_type(annotation, i, len(parts)) for i in range(len(parts)))
        values = [_parse(p, t, where) for p, t in zip(parts, items, strict=True)]
        return (origin or annotation)(values)
    elif annotation in (Any, object):
        try:
            return freeze(json.loads(text), where)
        except json.JSONDecodeError:
            return text
    elif is_section(annotation):
        if text.startswith("{"):
            return decode(_json(text, where), declared, where)
        if text.isidentifier():
            return construct(class_named(text, declared, where), {}, where)
    elif annotation is dict or origin in (dict, Mapping):
        return decode(_json(text, where), declared, where)
    elif annotation is Path:
        return Path(text)
    raise _unreadable(where, declared, text)


def _number(text: str, kind: type[int] | type[float]) -> int | float | None:
    """The number in `text`, or None. 1e3 and 1_000 are ints too, 1.5 and 1000.0 are not."""
    try:
        return kind(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        return None
    whole = kind is int and "." not in text and number.is_integer()
    return int(number) if whole else None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"{where}: {text!r} is not JSON: {error}") from error


def _unreadable(where: str, annotation: Any, text: str) -> BadInput:
    return BadInput(f"{where}: expected {describe_type(annotation)}, got {text!r}")
