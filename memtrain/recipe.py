"""Recipes: Python files with functions that return an `Experiment`, loaded by path."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import inspect
import json
import sys
import traceback
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from memtrain.config import Experiment, validated
from memtrain.description import LayerDescription
from memtrain.errors import BadInput
from memtrain.model.config import Block
from memtrain.schema import UnknownType, from_dict, nearest


def load_recipe(spec: str) -> Experiment:
    """The experiment of "path/to/file.py[:function]", or of a run's config.json.

    Without a function: the one called `recipe`, else the only one annotated to return an
    Experiment, else the only public one. Whatever goes wrong in the file is a `BadInput` in one
    line, with the file and line where it happened.
    """
    path, function_name = _split(spec)
    if path.suffix == ".json":
        return read_experiment(path)
    module = load_module(path)
    function = _choose(module, path, function_name)
    place = f"{path}:{function.__code__.co_firstlineno}"
    needed = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise BadInput(
            f"{place}: {function.__name__} needs arguments ({', '.join(needed)}); "
            "a recipe is called without any"
        )
    with _told_in_one_line(path):
        result = function()
    if not isinstance(result, Experiment):
        raise BadInput(
            f"{place}: {function.__name__} returned {type(result).__name__}, "
            "and a recipe returns an Experiment"
        )
    return validated(result, source=place)


def load_module(path: Path) -> ModuleType:
    """The recipe file as a module, under a name of its own. Defines the memories written in it."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(_no_such_file(path))
    # Dataclasses and pickles look their module up by name, so it is registered under one that two
    # files of the same stem do not share.
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"memtrain_recipe_{path.stem}_{digest}"
    module_spec = importlib.util.spec_from_file_location(name, path.resolve())
    if module_spec is None or module_spec.loader is None:
        raise BadInput(f"{path} is not a Python file: a recipe is path/to/file.py[:function]")
    module = importlib.util.module_from_spec(module_spec)
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        with _told_in_one_line(path):
            module_spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name)
        if before is not None:
            sys.modules[name] = before
        raise
    return module


def read_experiment(path: Path) -> Experiment:
    """The experiment written in a run's config.json."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise BadInput(f"{path} is not JSON: {error}") from error
    return from_dict(Experiment, data, source=str(path))


def with_layers(
    experiment: Experiment,
    change: Callable[[LayerDescription], LayerDescription | None],
    *,
    name: str,
) -> Experiment:
    """The experiment under another name, with `change` made of every layer of its pattern.

    What becomes None is left out, and a block that has nothing left with it. For recipes that are
    another one with a layer exchanged.
    """

    def changed(layer: LayerDescription | None) -> LayerDescription | None:
        return None if layer is None else change(layer)

    pattern: list[Block | LayerDescription] = []
    for entry in experiment.model.pattern:
        if isinstance(entry, Block):
            block = dataclasses.replace(entry, mixer=changed(entry.mixer), ffn=changed(entry.ffn))
            if block.mixer is not None or block.ffn is not None:
                pattern.append(block)
        elif (layer := change(entry)) is not None:
            pattern.append(layer)
    model = dataclasses.replace(experiment.model, pattern=tuple(pattern))
    return dataclasses.replace(experiment, name=name, model=model)


def experiment_of_run(run: Path) -> Experiment:
    """The experiment in a run directory, where layers may be described in the recipe itself.

    Names that the configuration uses and nobody has defined are looked for in the recipe that the
    run was begun with. Raises `BadInput` if they cannot be found.
    """
    try:
        return read_experiment(run / "config.json")
    except UnknownType:
        try:
            begun = json.loads((run / "run.json").read_text(encoding="utf-8"))["recipe"]
            path = _split(begun)[0]
        except (OSError, ValueError, KeyError, TypeError):
            path = None
        if path is None or path.suffix == ".json" or not path.is_file():
            raise
        load_module(path)
        return read_experiment(run / "config.json")


def _split(spec: str) -> tuple[Path, str | None]:
    head, colon, tail = spec.rpartition(":")
    if colon and head and not Path(spec).exists():
        if not tail.isidentifier():
            raise BadInput(f"recipe {spec!r}: {tail!r} is not the name of a function")
        return Path(head), tail
    return Path(spec), None


def _no_such_file(path: Path) -> str:
    what = f"{path} is a folder" if path.is_dir() else f"there is no recipe {path}"
    folder = path if path.is_dir() else path.parent
    stems = [found.stem for found in folder.glob("*.py")] if folder.is_dir() else []
    if (near := nearest(path.stem, stems)) is not None:
        return f"{what}: did you mean {folder / near}.py?"
    return f"{what}: a recipe is path/to/file.py[:function]"


def _choose(module: ModuleType, path: Path, name: str | None) -> Callable[..., Any]:
    public = {
        key: value
        for key, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not key.startswith("_")
    }
    listed = f"it has {', '.join(public)}" if public else "it has no public function"
    if name is not None:
        chosen = getattr(module, name, None)
        if inspect.isfunction(chosen):
            return chosen
        hint = nearest(name, list(public))
        said = f"did you mean {hint!r}?" if hint else listed
        raise BadInput(f"{path} has no function {name!r}: {said}")
    if "recipe" in public:
        return public["recipe"]
    annotated = [f for f in public.values() if _returns_experiment(f)]
    candidates = annotated or list(public.values())
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise BadInput(f"{path} has no public function: a recipe is one that returns an Experiment")
    names = ", ".join(f.__name__ for f in candidates)
    raise BadInput(
        f"{path} has several functions ({names}): choose one, as in {path}:{candidates[0].__name__}"
    )


def _returns_experiment(function: Callable[..., Any]) -> bool:
    try:
        return typing.get_type_hints(function).get("return") is Experiment
    except Exception:  # An annotation that cannot be evaluated is no reason to fail.
        return False


@contextlib.contextmanager
def _told_in_one_line(path: Path) -> Iterator[None]:
    """Inside, the file's neighbours can be imported, and what it raises becomes a `BadInput`."""
    folder = str(path.resolve().parent)
    # Last, so that a neighbour called like an installed package does not hide it.
    sys.path.append(folder)
    try:
        yield
    except SyntaxError as error:
        name = Path(error.filename).name if error.filename else path.name
        shown = path if name == path.name else name
        raise BadInput(f"{shown}:{error.lineno}: {type(error).__name__}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        raise BadInput(f"{path}:{_line(error, path)}: {_described(error)}") from error
    finally:
        sys.path.remove(folder)


def _line(error: BaseException, path: Path) -> int:
    """The innermost line of the recipe itself that led to the error."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f.lineno for f in frames if Path(f.filename) == path.resolve() and f.lineno]
    return own[-1] if own else 1


def _described(error: BaseException) -> str:
    if isinstance(error, BadInput):
        return str(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
