"""Typed configuration: frozen dataclasses to JSON and back, and `key=value` overrides of them.

The type annotations of the dataclasses are the schema. Reading is strict: an unknown key, a missing
one or a value of another type is a `BadInput` that says where, what was expected and what was there.
Imports no JAX, and nothing of memtrain but its errors, so that any module can describe itself.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import json
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from memtrain.errors import BadInput


_REGISTERED: dict[str, type] = {}
_BUILT_IN = ("memtrain.memory", "memtrain.model")
"""Imported when a type name is unknown, so that a stored configuration can be read by itself."""

_NULL = ("null", "none")
_BOOLS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}


def register[T: type](cls: T | None = None, name: str | None = None) -> Any:
    """Give a description class the name under which it is written: `@register` or `@register(name=...)`.

    Subclasses of the class that a field is declared with (a `LayerDescription`, say) are known by
    their class name without this; register where two have one name, or where there is no base.
    """
    if cls is None:
        return functools.partial(register, name=name)
    name = name or cls.__name__
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"register({cls.__name__}): only dataclasses describe themselves")
    if any(field.name == "type" for field in dataclasses.fields(cls)):
        raise TypeError(f"register({cls.__name__}): a field may not be called 'type'")
    known = _REGISTERED.get(name)
    if known is not None and not _same_class(known, cls):
        raise ValueError(f"two descriptions are called {name!r}: {known!r} and {cls!r}")
    _REGISTERED[name] = cls
    return cls


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as a dict that `json.dumps(allow_nan=False)` accepts.

    A dataclass whose class does not follow from the annotation alone carries `{"type": name}`.
    """
    return _encode(config, type(config), "")


def from_dict[T](cls: type[T], data: Mapping[str, Any], *, source: str = "") -> T:
    """The inverse of `to_dict`. Strict; `source` (a file, say) is named first in every error."""
    try:
        return _decode(data, cls, "")
    except BadInput as error:
        raise BadInput(f"{source}: {error}") if source else error from error.__cause__


def override[T](config: T, assignments: Sequence[str]) -> T:
    """`config` with every `key=value` applied at once, in order: a later one wins over an earlier.

    A key is a path of field names and tuple indices; the text is read as the annotation says. Checks
    of the dataclasses see the result only, never a half-applied state. See docs/configuration.md.
    """
    root = _Change()
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise BadInput(f"override {assignment!r}: expected key=value, as in train.num_steps=100")
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
                walk(getattr(value, field.name), _join(where, field.name))
        elif isinstance(value, tuple) and any(dataclasses.is_dataclass(v) for v in value):
            for index, item in enumerate(value):
                walk(item, _join(where, str(index)))
        else:
            keys.append(where)

    walk(config, "")
    return keys


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word that `word` was probably meant to be, or None."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


# Annotations


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Annotations of the fields that `__init__` takes."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _resolve(annotation: Any) -> Any:
    """The annotation without aliases, `Annotated`, `NewType`, `Final` and their like."""
    while True:
        if isinstance(annotation, typing.TypeAliasType):
            annotation = annotation.__value__
        elif isinstance(annotation, typing.NewType):
            annotation = annotation.__supertype__
        elif isinstance(annotation, typing.TypeVar):
            annotation = annotation.__bound__ or Any
        elif get_origin(annotation) is typing.Annotated:
            annotation = get_args(annotation)[0]
        else:
            return annotation


def _members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation itself."""
    annotation = _resolve(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(m for arg in get_args(annotation) for m in _members(arg))
    return (annotation,)


def _is_section(annotation: Any) -> bool:
    """Whether the values are dataclasses: the annotation is one, or a class without a scalar's meaning."""
    if dataclasses.is_dataclass(annotation):
        return True
    scalars = (bool, int, float, str, type(None), object, Path, tuple, list, dict)
    return isinstance(annotation, type) and annotation not in scalars


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _say(annotation: Any) -> str:
    """The annotation in words, for errors."""
    members = _members(annotation)
    if len(members) > 1:
        return " or ".join(_say(m) for m in members)
    (one,) = members
    origin, args = get_origin(one), get_args(one)
    if one is type(None):
        return "null"
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in args)
    if origin is list or (origin is tuple and args[-1:] == (Ellipsis,)):
        return f"a list, each item {_say(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)} ({', '.join(_say(a) for a in args)})"
    if one in _WORDS:
        return _WORDS[one]
    return one.__name__ if isinstance(one, type) else str(one)


def _got(value: Any) -> str:
    """A JSON value (or what a recipe put in its place) and its kind, for errors."""
    text = "null" if value is None else repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    kinds = {Mapping: "an object", str: "text", list: "a list", tuple: "a list"}
    kind = next((name for kind, name in kinds.items() if isinstance(value, kind)), None)
    if value is None or isinstance(value, bool | int | float):
        return text
    return f"{text} ({kind or type(value).__name__})"


def _mismatch(where: str, annotation: Any, value: Any) -> BadInput:
    return BadInput(f"{where or 'configuration'}: expected {_say(annotation)}, got {_got(value)}")


def _unreadable(where: str, annotation: Any, text: str) -> BadInput:
    return BadInput(f"{where}: expected {_say(annotation)}, got {text!r}")


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


# Names of classes


def _same_class(a: type, b: type) -> bool:
    """The same class, or the same source loaded a second time."""
    return (a.__module__, a.__qualname__) == (b.__module__, b.__qualname__)


def _subclasses(base: type) -> dict[str, list[type]]:
    """Dataclasses below `base` by class name; of one source loaded twice, the newest."""
    found: dict[str, list[type]] = {}
    todo = [base]
    while todo:
        cls = todo.pop(0)
        todo.extend(type.__subclasses__(cls))
        if dataclasses.is_dataclass(cls):
            rest = [known for known in found.get(cls.__name__, []) if not _same_class(known, cls)]
            found[cls.__name__] = [*rest, cls]
    return found


def _tag(cls: type, declared: Any) -> str | None:
    """The name that a value of `cls` carries in a field of type `declared`; None: it needs none."""
    for name, known in _REGISTERED.items():
        if known is cls:
            return name
    if _sections(declared) == [cls]:
        return None
    bases = [m for m in _sections(declared) if issubclass(cls, m)]
    if any(len(_subclasses(base).get(cls.__name__, [])) == 1 for base in bases):
        return cls.__name__
    raise BadInput(
        f"the class {cls.__module__}.{cls.__qualname__} has no name to be written under: "
        "decorate it with memtrain.config.register"
    )


def _sections(declared: Any) -> list[type]:
    return [m for m in _members(declared) if _is_section(m)]


def _class_named(name: Any, declared: Any, where: str) -> type:
    """The class that a "type" tag names, checked against the annotation."""
    if not isinstance(name, str):
        raise _mismatch(_join(where, "type"), str, name)
    bases = _sections(declared)
    cls = _find_class(name, bases)
    if cls is None:
        for module in _BUILT_IN:
            importlib.import_module(module)
        cls = _find_class(name, bases)
    if cls is None:
        known = sorted({*_REGISTERED, *(n for base in bases for n in _subclasses(base))})
        hint = nearest(name, known)
        raise BadInput(
            f"{_join(where, 'type')}: unknown type {name!r}: "
            + (f"did you mean {hint!r}? If it is your own," if hint else "if it is your own,")
            + " the module that defines it must be imported first"
        )
    if bases and not any(_fits(cls, base) for base in bases):
        raise BadInput(f"{where}: expected {_say(declared)}, got a {name}")
    return cls


def _fits(cls: type, base: type) -> bool:
    if getattr(base, "_is_protocol", False):  # A protocol cannot be checked on a class alone.
        return True
    return issubclass(cls, base)


def _find_class(name: str, bases: list[type]) -> type | None:
    if name in _REGISTERED:
        return _REGISTERED[name]
    found = {cls for base in bases for cls in _subclasses(base).get(name, [])}
    if len(found) > 1:
        several = ", ".join(sorted(f"{c.__module__}.{c.__qualname__}" for c in found))
        raise BadInput(f"several classes are called {name!r}: {several}; register them by name")
    return found.pop() if found else None


# Values to JSON


def _encode(value: Any, declared: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        name = None if where == "" and declared is cls else _tag(cls, declared)
        fields = {
            key: _encode(getattr(value, key), hint, _join(where, key))
            for key, hint in _hints(cls).items()
        }
        return fields if name is None else {"type": name, **fields}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        items = [_item_type(declared, i, len(value)) for i in range(len(value))]
        return [
            _encode(v, t, _join(where, str(i)))
            for i, (v, t) in enumerate(zip(value, items, strict=True))
        ]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        inner = next((get_args(m)[1] for m in _members(declared) if len(get_args(m)) == 2), Any)
        return {key: _encode(v, inner, _join(where, key)) for key, v in value.items()}
    raise _mismatch(where, declared, value)


def _item_type(declared: Any, index: int, length: int) -> Any:
    """The annotation of item `index` of a tuple or list of `length`."""
    for member in _members(declared):
        args = get_args(member)
        if get_origin(member) is list:
            return args[0]
        if get_origin(member) is tuple and args[-1:] == (Ellipsis,):
            return args[0]
        if get_origin(member) is tuple and len(args) == length:
            return args[index]
    return Any


# JSON to values


def _decode(value: Any, declared: Any, where: str) -> Any:
    members = _members(declared)
    if len(members) == 1:
        return _decode_one(value, members[0], declared, where)
    if isinstance(value, Mapping) and _sections(declared):
        return _decode_section(value, declared, where)
    # A member of just the value's type comes first: 1 stays an int in `float | int`.
    ordered = sorted(members, key=lambda m: m is not type(value))
    errors = []
    for member in ordered:
        try:
            return _decode_one(value, member, declared, where)
        except BadInput as error:
            errors.append((member, error))
    choices = [e for m, e in errors if m is not type(None)]
    # With one real member its own error says most: which item of a list was wrong.
    raise choices[0] if len(choices) == 1 and value is not None else _mismatch(
        where, declared, value
    )


def _decode_one(value: Any, annotation: Any, declared: Any, where: str) -> Any:
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation in (Any, object):
        return _freeze(value, where)
    if annotation is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if value in ("inf", "-inf", "nan"):
            return float(value)
    elif annotation in (int, str):
        if isinstance(value, annotation) and not isinstance(value, bool):
            return value
    elif annotation in (bool, type(None)):
        if isinstance(value, annotation):
            return value
    elif annotation is Path:
        if isinstance(value, str):
            return Path(value)
    elif origin is Literal:
        for choice in args:
            if choice == value and type(choice) is type(value):
                return choice
        hint = nearest(str(value), [str(choice) for choice in args])
        raise BadInput(
            f"{where}: expected {_say(annotation)}, got {_got(value)}"
            + (f": did you mean {hint!r}?" if hint else "")
        )
    elif annotation in (tuple, list) or origin in (tuple, list):
        if isinstance(value, list | tuple):
            return _decode_items(value, annotation, where)
    elif annotation is dict or origin in (dict, Mapping):
        if isinstance(value, Mapping):
            inner = args[1] if args else Any
            return {key: _decode(v, inner, _join(where, key)) for key, v in value.items()}
    elif _is_section(annotation):
        if isinstance(value, Mapping):
            return _decode_section(value, declared, where)
    else:
        raise TypeError(f"{where}: configuration fields cannot be {annotation}")
    raise _mismatch(where, annotation if annotation is declared else declared, value)


def _decode_items(value: Sequence[Any], annotation: Any, where: str) -> Any:
    origin, args = get_origin(annotation) or annotation, get_args(annotation)
    if origin is tuple and args and args[-1] is not Ellipsis and len(args) != len(value):
        raise _mismatch(where, annotation, list(value))
    items = [
        _decode(item, _item_type(annotation, i, len(value)), _join(where, str(i)))
        for i, item in enumerate(value)
    ]
    return origin(items)


def _decode_section(value: Mapping[str, Any], declared: Any, where: str) -> Any:
    """A dataclass from an object, by its tag or by the annotation."""
    sections = _sections(declared)
    fields = dict(value)
    if "type" in fields and not any("type" in _hints_or_none(s) for s in sections):
        cls = _class_named(fields.pop("type"), declared, where)
    elif len(sections) == 1 and dataclasses.is_dataclass(sections[0]):
        cls = sections[0]
    else:
        raise BadInput(f'{where}: expected {_say(declared)}, with a "type"')
    hints = _hints(cls)
    for key in fields:
        if key not in hints:
            raise unknown_key(key, list(hints), where)
    values = {key: _decode(v, hints[key], _join(where, key)) for key, v in fields.items()}
    return _construct(cls, values, where)


def _hints_or_none(cls: type) -> dict[str, Any]:
    return _hints(cls) if dataclasses.is_dataclass(cls) else {}


def _construct(cls: type, values: dict[str, Any], where: str) -> Any:
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.init
        and field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise BadInput(f"{where or 'configuration'}: missing {', '.join(missing)}")
    return _checked(lambda: cls(**values), where)


def _checked[T](make: Callable[[], T], where: str) -> T:
    """What `make` returns; the dataclass's own complaint becomes a `BadInput` that says where."""
    try:
        return make()
    except (ValueError, TypeError) as error:
        # Some name their fields in full already.
        placed = not where or str(error).startswith(f"{where}.")
        raise BadInput(str(error) if placed else f"{where}: {error}") from error


def _freeze(value: Any, where: str) -> Any:
    if isinstance(value, Mapping) and "type" in value:
        return _decode_section(value, object, where)
    if isinstance(value, list | tuple):
        return tuple(_freeze(v, _join(where, str(i))) for i, v in enumerate(value))
    return value


def unknown_key(key: str, known: list[str], where: str = "", leaves: Sequence[str] = ()) -> BadInput:
    """The error for a key that does not exist; `leaves` are full keys where it may be found instead."""
    full = _join(where, key)
    hint = nearest(key, known)
    hint = _join(where, hint) if hint else None
    if hint is None:
        by_end = {leaf.rpartition(".")[2]: leaf for leaf in reversed(leaves)}
        end = nearest(key.rpartition(".")[2], list(by_end))
        hint = by_end[end] if end else None
    if hint is not None:
        return BadInput(f"unknown key {full!r}: did you mean {hint!r}?")
    place = f"in {where!r}" if where else "at the top"
    return BadInput(f"unknown key {full!r}: {place} there are {', '.join(known)}")


# Overrides


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
        hints = _hints(type(value))
        for key, child in change.children.items():
            if key not in hints:
                last = key
                while child.children:
                    last, child = next(iter(child.children.items()))
                leaves = [leaf for leaf in leaf_keys(root) if leaf.rpartition(".")[2] == last]
                raise unknown_key(key, list(hints), where, leaves or leaf_keys(root))
        changed = {
            key: _apply(getattr(value, key), hints[key], child, _join(where, key), root)
            for key, child in change.children.items()
        }
        return _checked(lambda: dataclasses.replace(value, **changed), where)
    if isinstance(value, tuple | list):
        items = list(value)
        for key, child in change.children.items():
            if not key.isdecimal() or int(key) >= len(items):
                raise BadInput(
                    f"unknown key {_join(where, key)!r}: {where!r} is a list of {len(items)}, "
                    f"counted from 0"
                )
            item = _item_type(declared, int(key), len(items))
            items[int(key)] = _apply(items[int(key)], item, child, _join(where, key), root)
        return type(value)(items)
    if isinstance(value, Mapping):
        inner = next((get_args(m)[1] for m in _members(declared) if len(get_args(m)) == 2), Any)
        return dict(value) | {
            key: _apply(value.get(key), inner, child, _join(where, key), root)
            for key, child in change.children.items()
        }
    below = _join(where, next(iter(change.children)))
    raise BadInput(f"unknown key {below!r}: {where!r} is {_say(declared)} and has no parts")


def _default_section(declared: Any, where: str, child: str) -> Any:
    """The section with its defaults, where there is none yet and one of its fields is set."""
    sections = _sections(declared)
    if len(sections) != 1 or not dataclasses.is_dataclass(sections[0]):
        what = f"is null; set {where}=TYPE first" if sections else "has no parts"
        raise BadInput(f"unknown key {_join(where, child)!r}: {where!r} {what}")
    return _construct(sections[0], {}, where)


def _parse(text: str, declared: Any, where: str) -> Any:
    """The value that a text on the command line stands for, as the annotation says."""
    members = _members(declared)
    stripped = text.strip()
    if type(None) in members and stripped.lower() in _NULL:
        return None
    # str takes any text, so it is asked last.
    ordered = sorted((m for m in members if m is not type(None)), key=lambda m: m in (str, Path))
    for member in ordered:
        try:
            return _parse_one(stripped if member is not str else text, member, declared, where)
        except BadInput as error:
            if len(ordered) == 1:
                raise
            last = error
    raise _unreadable(where, declared, text) from last


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
        return _decode(choice, annotation, where)
    elif annotation in (tuple, list) or origin in (tuple, list):
        if text.startswith("["):
            return _decode(_json(text, where), annotation, where)
        parts = [part.strip() for part in text.split(",")] if text else []
        if parts and not parts[-1]:  # A comma at the end, as in "a.txt,"
            parts.pop()
        args = get_args(annotation)
        if origin is tuple and args and args[-1] is not Ellipsis and len(args) != len(parts):
            raise _unreadable(where, annotation, text)
        items = (_item_type(annotation, i, len(parts)) for i in range(len(parts)))
        values = [_parse(p, t, where) for p, t in zip(parts, items, strict=True)]
        return (origin or annotation)(values)
    elif annotation in (Any, object):
        try:
            return _freeze(json.loads(text), where)
        except json.JSONDecodeError:
            return text
    elif _is_section(annotation):
        if text.startswith("{"):
            return _decode(_json(text, where), declared, where)
        if text.isidentifier():
            return _construct(_class_named(text, declared, where), {}, where)
    elif annotation is dict or origin in (dict, Mapping):
        return _decode(_json(text, where), declared, where)
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
