"""`memtrain`: parses the command line, runs a command, and turns what happened into an exit code.

0 done, 1 our bug, 2 bad input, 71 lost a peer, 74 storage failed, 75 preempted and saved,
130 interrupted. Imports no JAX: `memtrain --help` is quick.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from memtrain.console import as_json, as_text, explain, stdout_to_stderr
from memtrain.errors import BUG, DONE, PREEMPTED, BadInput


INTERRUPTED = 130
BROKEN_PIPE = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Prints the result, or one line on stderr."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # A narrow terminal encoding is no reason to fail.
        sys.stdout.reconfigure(errors="replace")
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # Whoever read our output has gone, as in `| head`.
        code = BROKEN_PIPE
        _abandon_stdout()
    except OSError as error:  # Stdout is a file that cannot be written.
        line, code = explain(error) or (str(error), BUG)
        print(f"memtrain: error: standard output: {line}", file=sys.stderr)
        _abandon_stdout()
    return code


def _abandon_stdout() -> None:
    """What could not be written must not be tried again when Python exits, with another error."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _run(arguments: list[str]) -> int:
    if arguments in (["--version"], ["-V"]):
        print(f"memtrain {version('memtrain')}")
        return DONE
    try:
        if "--json" in arguments:
            return _run_for_scripts(arguments)
        return _guarded(lambda: _run_for_people(arguments))[0]
    except SystemExit as stop:  # After --help.
        return stop.code if isinstance(stop.code, int) else DONE


def _run_for_people(arguments: list[str]) -> dict[str, Any]:
    command = _parsed(arguments)
    result = command.run()
    print(getattr(command, "show", as_text)(result))
    return result


def _run_for_scripts(arguments: list[str]) -> int:
    """The same with exactly one JSON object on stdout, errors included."""
    if {"-h", "--help"} & set(arguments):
        _parsed(arguments)
    with stdout_to_stderr() as out:
        code, result = _guarded(lambda: _parsed(arguments).run())
        print(as_json(result), file=out, flush=True)
    return code


def _guarded(run: Callable[[], dict[str, Any]]) -> tuple[int, dict[str, Any]]:
    """The exit code and the result; after an error, what --json says of it. One line on stderr."""
    try:
        result = run()
        return int(result.get("exit_code", DONE)), result
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        return INTERRUPTED, {"error": "interrupted", "exit_code": INTERRUPTED}
    except Exception as error:
        told = explain(error)
        if told is None or os.environ.get("MEMTRAIN_TRACEBACK") == "1":
            traceback.print_exc()
        line, code = told or (f"{type(error).__name__}: {error}", BUG)
        if told is not None:
            # A job that was asked to stop, and has saved, did nothing wrong.
            kind = "" if code == PREEMPTED else "error: "
            print(f"memtrain: {kind}{line}", file=sys.stderr, flush=True)
        return code, {"error": line, "exit_code": code}


def _parsed(arguments: list[str]) -> Any:
    """The command. The box in which tyro tells what is wrong becomes a `BadInput` of one line."""
    from memtrain.commands import COMMANDS, parse
    from memtrain.schema import nearest

    first = arguments[0] if arguments else None
    if first not in COMMANDS and first not in ("-h", "--help"):
        known = ", ".join(COMMANDS)
        if first is None or first.startswith("-"):
            raise BadInput(f"expected a command first: {known}; see memtrain --help")
        hint = nearest(first, list(COMMANDS))
        said = f"did you mean {hint!r}?" if hint else f"there are {known}"
        raise BadInput(f"unknown command {first!r}: {said}")
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return parse(arguments)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        line = _unboxed(box.getvalue(), arguments, COMMANDS[arguments[0]])
        more = "" if line.endswith("?") else f"; see memtrain {first} --help"
        raise BadInput(line + more) from None


def _unboxed(box: str, arguments: list[str], command: type) -> str:
    """The gist of tyro's error box. Where its words are new to us, the first paragraph of them."""
    from memtrain.commands import options
    from memtrain.schema import describe_type, nearest

    # Drawn with lines where the terminal knows them, and with dashes where it does not.
    lines = [line.replace("\u2502", " ") for line in box.splitlines()]
    lines = [line.rstrip() for line in lines if line.strip() and line[0] not in "\u256d\u2570"]
    rules = [i for i, line in enumerate(lines) if not line.strip(" -\u2500")]
    begin = 0 if "\u256d" in box else 2  # A title in dashes is two lines of its own.
    end = next((i for i in rules if i > begin), len(lines))
    paragraph = textwrap.dedent("\n".join(lines[begin:end])).splitlines()
    text = " ".join(" ".join(paragraph).split())
    known = options(command)
    if text.startswith("Missing from"):
        # Names are indented by four, what they mean by more.
        names = [line.strip() for line in paragraph if re.match(r" {4}\S", line)]
        return f"missing {' and '.join(names)}"
    if text.startswith("Unrecognized options: "):
        tokens = text.removeprefix("Unrecognized options: ").split(", ")
        token = next((t for t in tokens if t.startswith("-")), tokens[0])
        if not token.startswith("-"):
            return f"unexpected {token!r}: give a value after its option"
        hint = nearest(token.partition("=")[0], list(known))
        return f"unknown option {token}" + (f": did you mean {hint}?" if hint else "")
    if found := re.match(r"Missing value for argument '(--[\w-]+)'", text):
        return f"{found[1]} needs a value"
    wrong = r"Error parsing (--[\w-]+)|invalid choice .* for argument '(--[\w-]+)'"
    if found := re.match(wrong, text, re.IGNORECASE):
        option = found[1] or found[2]
        if option in known:
            given = _given(option, arguments)
            return f"{option}: expected {describe_type(known[option])}, got {given!r}"
    return text


def _given(option: str, arguments: list[str]) -> str:
    """The value that followed the option, for errors."""
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument == option:
            return after
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
    return ""
