"""What commands print: a result as JSON or as text, an error as one line."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from memtrain.errors import STORAGE_FAILED, MemtrainError


_FULL = {errno.ENOSPC, errno.EDQUOT}


def as_json(result: Mapping[str, Any]) -> str:
    """One line of strict JSON: paths and arrays as text and lists, non-finite numbers as null."""
    return json.dumps(_plain(result), allow_nan=False)


def as_text(result: Mapping[str, Any]) -> str:
    """A result for people: a line per value, a table per list of rows."""
    lines, tables = [], []
    width = max((len(key) for key in result), default=0)
    for key, value in _plain(result).items():
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            tables.append(f"\n{key}\n{_table(value)}")
        elif isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
            rows = [{key: name, **row} for name, row in value.items()]
            tables.append(f"\n{_table(rows)}")
        else:
            lines.append(f"{key:<{width}}  {as_cell(value)}")
    return "\n".join([*lines, *tables])


def _table(rows: Sequence[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([as_cell(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    return "\n".join("  " + line.rstrip() for line in lines)


def as_cell(value: Any) -> str:
    """One value for people, on one line."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, list):
        return ", ".join(as_cell(v) for v in value) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{k} {as_cell(v)}" for k, v in value.items())
    return str(value)


def _plain(value: Any) -> Any:
    """Only what JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "tolist"):  # Arrays and their scalars.
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[TextIO]:
    """Sends everything that is printed inside to stderr, from C and from children too.

    Yields the stream that still leads to stdout, for the one object that belongs there.
    """
    out = sys.stdout
    with contextlib.ExitStack() as stack:
        real = _file_number(out)
        if real is not None:
            out.flush()
            kept = os.dup(real)
            os.dup2(2, real)
            stream: TextIO = stack.enter_context(os.fdopen(kept, "w", encoding="utf-8"))
            stack.callback(lambda: (out.flush(), os.dup2(kept, real)))
        else:
            stream = out
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield stream
        stream.flush()


def _file_number(stream: Any) -> int | None:
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):  # Replaced, as tests and notebooks do.
        return None


def explain(error: BaseException) -> tuple[str, int] | None:
    """One line for people and the exit code; None if the error is a bug of ours."""
    if isinstance(error, MemtrainError):
        return " ".join(str(error).splitlines()), error.exit_code
    for cause in _causes(error):
        if isinstance(cause, MemtrainError):
            return None  # Wrapped on purpose by somebody: not for us to unwrap.
        if _is_full(cause):
            name = getattr(cause, "filename", None)
            said = os.strerror(getattr(cause, "errno", None) or errno.ENOSPC)
            place = f"{name}: " if name else ""
            return (
                f"{place}{said}: free some space, then run the same command again",
                STORAGE_FAILED,
            )
    return None


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    # Libraries in C++ (TensorStore) give the system's words in an error of their own.
    return any(os.strerror(number) in str(error) for number in _FULL)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what led to it, and the members of groups."""
    todo, seen = [error], set()
    while todo:
        one = todo.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        todo.extend(e for e in (one.__cause__, one.__context__) if e is not None)
        if isinstance(one, BaseExceptionGroup):
            todo.extend(one.exceptions)
