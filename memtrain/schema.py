"""Typed configuration: frozen dataclasses to JSON and back.

The type annotations of the dataclasses are the schema. Reading is strict: an unknown key, a missing
one or a value of another type is a `BadInput` that says where, what was expected and what was got.
Imports no JAX, and nothing of memtrain but its errors, so that any module can describe itself.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, overload

from memtrain.errors import BadInput


_REGISTERED: dict[str, type] = {}
_BUILT_IN = ("memtrain.layers",)
"""Imported when a type name is unknown, so that a stored configuration can be read by itself."""


class UnknownType(BadInput):
    """A "type" that nobody has defined: its module was not imported, or it is misspelt."""


@overload
def register[T](cls: type[T], name: str | None = None) -> type[T]: ...
@overload
def register[T](cls: None = None, name: str | None = None) -> Callable[[type[T]], type[T]]: ...
def register(cls: Any = None, name: str | None = None) -> Any:
    """Name a description class as it is written in JSON: `@register` or `@register(name=...)`.

    Subclasses of the class that a field is declared with (a `LayerDescription`, say) are known by
    their class name without this; register where two have one name, or where there is no base.
    """
    if cls is None:
        return functools.partial(register, name=name)
    described: type = cls
    known_as = name or described.__name__
    if not dataclasses.is_dataclass(described):
        raise TypeError(f"register({known_as}): only dataclasses describe themselves")
    if any(field.name == "type" for field in dataclasses.fields(described)):
        raise TypeError(f"register({known_as}): a field may not be called 'type'")
    other = _REGISTERED.get(known_as)
    if other is not None and not _same_class(other, described):
        raise ValueError(f"two descriptions are called {known_as!r}: {other!r} and {described!r}")
    _REGISTERED[known_as] = described
    return described


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as a dict that `json.dumps(allow_nan=False)` accepts.

    A dataclass whose class does not follow from the annotation alone carries `{"type": name}`.
    """
    return _encode(config, type(config), "")


def from_dict[T](cls: type[T], data: Mapping[str, Any], *, source: str = "") -> T:
    """The inverse of `to_dict`. Strict; `source` (a file, say) is named first in every error."""
    try:
        return decode(data, cls, "")
    except BadInput as error:
        if not source:
            raise
        raise type(error)(f"{source}: {error}") from error.__cause__


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word that `word` was probably meant to be, or None."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


# Annotations


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
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


def members(annotation: Any) -> list[Any]:
    """The members of a union, or the annotation itself."""
    annotation = _resolve(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return [m for arg in get_args(annotation) for m in members(arg)]
    return [annotation]


def is_section(annotation: Any) -> bool:
    """Whether its values are dataclasses: it is one, or a base that is no scalar's class."""
    if dataclasses.is_dataclass(annotation):
        return True
    scalars = (bool, int, float, str, type(None), object, Path, tuple, list, dict)
    return isinstance(annotation, type) and annotation not in scalars


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def describe_type(annotation: Any) -> str:
    """The annotation in words, for errors."""
    several = members(annotation)
    if len(several) > 1:
        return " or ".join(describe_type(member) for member in several)
    one = several[0]
    origin, args = get_origin(one), get_args(one)
    if one is type(None):
        return "null"
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in args)
    if origin is list or (origin is tuple and args[-1:] == (Ellipsis,)):
        return f"a list, each item {describe_type(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)} ({', '.join(describe_type(a) for a in args)})"
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
    return BadInput(
        f"{where or 'configuration'}: expected {describe_type(annotation)}, got {_got(value)}"
    )


def join(where: str, key: str) -> str:
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
    if (name := _registered_as(cls)) is not None:
        return name
    bases = sections(declared)
    if bases == [cls]:
        return None
    if any(base.__module__.startswith("memtrain.") for base in bases):
        # Our own names must be known: not to be missed here, nor given to another class.
        _import_built_in()
    if (name := _registered_as(cls)) is not None:
        return name
    below = [_subclasses(base).get(cls.__name__, []) for base in bases if issubclass(cls, base)]
    if cls.__name__ not in _REGISTERED and any(same == [cls] for same in below):
        return cls.__name__
    raise BadInput(
        f"the class {cls.__module__}.{cls.__qualname__} has no name of its own to be written "
        "under: decorate it with memtrain.config.register"
    )


def _registered_as(cls: type) -> str | None:
    return next((name for name, known in _REGISTERED.items() if known is cls), None)


def _import_built_in() -> None:
    for module in _BUILT_IN:
        importlib.import_module(module)


def sections(declared: Any) -> list[type]:
    return [m for m in members(declared) if is_section(m)]


def class_named(name: Any, declared: Any, where: str) -> type:
    """The class that a "type" tag names, checked against the annotation."""
    if not isinstance(name, str):
        raise _mismatch(join(where, "type"), str, name)
    bases = sections(declared)
    cls = _find_class(name, bases)
    if cls is None:
        _import_built_in()
        cls = _find_class(name, bases)
    if cls is None:
        known = sorted({*_REGISTERED, *(n for base in bases for n in _subclasses(base))})
        hint = nearest(name, known)
        raise UnknownType(
            f"{join(where, 'type')}: unknown type {name!r}. "
            + (f"Did you mean {hint!r}? " if hint else "")
            + "Import the module that defines it, or name its file with --recipe"
        )
    if bases and not any(_fits(cls, base) for base in bases):
        raise BadInput(f"{where}: expected {describe_type(declared)}, got {name}")
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
            key: _encode(getattr(value, key), hint, join(where, key))
            for key, hint in field_types(cls).items()
        }
        return fields if name is None else {"type": name, **fields}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        items = [item_type(declared, i, len(value)) for i in range(len(value))]
        return [
            _encode(v, t, join(where, str(i)))
            for i, (v, t) in enumerate(zip(value, items, strict=True))
        ]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        inner = next((get_args(m)[1] for m in members(declared) if len(get_args(m)) == 2), Any)
        return {key: _encode(v, inner, join(where, key)) for key, v in value.items()}
    raise _mismatch(where, declared, value)


def item_type(declared: Any, index: int, length: int) -> Any:
    """The annotation of item `index` of a tuple or list of `length`."""
    for member in members(declared):
        args = get_args(member)
        if get_origin(member) is list:
            return args[0]
        if get_origin(member) is tuple and args[-1:] == (Ellipsis,):
            return args[0]
        if get_origin(member) is tuple and len(args) == length:
            return args[index]
    return Any


# JSON to values


def decode(value: Any, declared: Any, where: str) -> Any:
    """The value of a field declared as `declared`, from JSON. `where` is its key, for errors."""
    several = members(declared)
    if len(several) == 1:
        return _decode_one(value, several[0], declared, where)
    if isinstance(value, Mapping) and sections(declared):
        return _decode_section(value, declared, where)
    # A member of just the value's type comes first: 1 stays an int in `float | int`.
    errors: list[BadInput] = []
    for member in sorted(several, key=lambda m: m is not type(value)):
        try:
            return _decode_one(value, member, declared, where)
        except BadInput as error:
            if member is not type(None):
                errors.append(error)
    # With one member besides null, its own error says most: which item of a list was wrong.
    raise errors[0] if len(errors) == 1 else _mismatch(where, declared, value)


def _decode_one(value: Any, annotation: Any, declared: Any, where: str) -> Any:
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation in (Any, object):
        return freeze(value, where)
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
            f"{where}: expected {describe_type(annotation)}, got {_got(value)}"
            + (f": did you mean {hint!r}?" if hint else "")
        )
    elif annotation in (tuple, list) or origin in (tuple, list):
        if isinstance(value, list | tuple):
            return _decode_items(value, annotation, where)
    elif annotation is dict or origin in (dict, Mapping):
        if isinstance(value, Mapping):
            inner = args[1] if args else Any
            return {key: decode(v, inner, join(where, key)) for key, v in value.items()}
    elif is_section(annotation):
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
        decode(item, item_type(annotation, i, len(value)), join(where, str(i)))
        for i, item in enumerate(value)
    ]
    return origin(items)


def _decode_section(value: Mapping[str, Any], declared: Any, where: str) -> Any:
    """A dataclass from an object, by its tag or by the annotation."""
    bases = sections(declared)
    fields = dict(value)
    if "type" in fields and not any("type" in _hints_or_none(s) for s in bases):
        cls = class_named(fields.pop("type"), declared, where)
    elif len(bases) == 1 and dataclasses.is_dataclass(bases[0]):
        cls = bases[0]
    else:
        raise BadInput(f'{where}: expected {describe_type(declared)}, with a "type"')
    hints = field_types(cls)
    for key in fields:
        if key not in hints:
            raise unknown_key(key, list(hints), where)
    values = {key: decode(v, hints[key], join(where, key)) for key, v in fields.items()}
    return construct(cls, values, where)


def _hints_or_none(cls: type) -> dict[str, Any]:
    return field_types(cls) if dataclasses.is_dataclass(cls) else {}


def construct(cls: type, values: dict[str, Any], where: str) -> Any:
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
    return checked(lambda: cls(**values), where)


def checked[T](make: Callable[[], T], where: str) -> T:
    """What `make` returns; the dataclass's own complaint becomes a `BadInput` that says where."""
    try:
        return make()
    except (ValueError, TypeError) as error:
        # Some name their fields in full already.
        placed = not where or str(error).startswith(f"{where}.")
        raise BadInput(str(error) if placed else f"{where}: {error}") from error


def freeze(value: Any, where: str) -> Any:
    if isinstance(value, Mapping) and "type" in value:
        return _decode_section(value, object, where)
    if isinstance(value, list | tuple):
        return tuple(freeze(v, join(where, str(i))) for i, v in enumerate(value))
    return value


def unknown_key(
    key: str, known: list[str], where: str = "", leaves: Sequence[str] = ()
) -> BadInput:
    """The error for a key that does not exist; it may be one of `leaves`, full keys elsewhere."""
    full = join(where, key)
    hint = nearest(key, known)
    hint = join(where, hint) if hint else None
    if hint is None:
        by_end = {leaf.rpartition(".")[2]: leaf for leaf in reversed(leaves)}
        end = nearest(key.rpartition(".")[2], list(by_end))
        hint = by_end[end] if end else None
    if hint is not None:
        return BadInput(f"unknown key {full!r}: did you mean {hint!r}?")
    place = f"in {where!r}" if where else "at the top"
    return BadInput(f"unknown key {full!r}: {place} there are {', '.join(known)}")
