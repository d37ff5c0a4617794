"""Words between the processes of a job, through the coordination service.

Host-side and named, so it may be used from a background thread: a device collective there would
interleave with the training step's own. With one process everything here is free.
"""

import json
from collections.abc import Callable
from typing import Any

from memtrain import errors
from memtrain.errors import MemtrainError, PeerLost


TIMEOUT_S = 1200.0


def process_index() -> int:
    """Index of this process in the job; does not start a backend."""
    return _state().process_id or 0


def process_count() -> int:
    """Processes in the job; does not start a backend."""
    return _state().num_processes or 1


def gather(name: str, word: str, timeout_s: float = TIMEOUT_S) -> list[str]:
    """Every process's word, by process index, on process 0; an empty list on the others.

    `name` is used once in the life of the job. Raises PeerLost naming who did not answer in time.
    """
    count = process_count()
    if count == 1:
        return [word]
    client = _state().client
    client.key_value_set(f"memtrain/{name}/{process_index()}", word)
    if process_index() != 0:
        return []
    words = [_get(client, f"{name}/{index}", index, timeout_s) for index in range(count)]
    client.key_value_delete(f"memtrain/{name}/")  # the service keeps all that it is told in memory
    return words


def tell(name: str, word: str | None, timeout_s: float = TIMEOUT_S) -> str:
    """The word of process 0, on every process; the others pass anything.

    `name` is used once in the life of the job. Raises PeerLost if process 0 does not answer.
    """
    if process_count() == 1:
        assert word is not None
        return word
    client = _state().client
    if process_index() == 0:
        assert word is not None
        client.key_value_set(f"memtrain/{name}", word)
        return word
    return _get(client, name, 0, timeout_s)


def forget(name: str) -> None:
    """Drop what was told under `name`, once every process is known to have read it."""
    if process_count() > 1 and process_index() == 0:
        _state().client.key_value_delete(f"memtrain/{name}")


def first_acts(name: str, act: Callable[[], Any]) -> Any:
    """Process 0 acts; every process gets its JSON result, or raises its MemtrainError."""
    failure: MemtrainError | None = None
    result: Any = None
    if process_index() == 0:
        try:
            result = act()
        except MemtrainError as error:
            failure = error
    kind = type(failure).__name__ if failure else None
    word = tell(name, json.dumps([kind, str(failure or ""), result]))
    if failure is not None:
        raise failure
    kind, text, result = json.loads(word)
    if kind is not None:
        raise getattr(errors, kind)(text)
    return result


def all_act(name: str, act: Callable[[], Any]) -> tuple[list[Any], str, Exception | None]:
    """Every process acts, and none goes on believing that another succeeded when it did not.

    Returns the JSON results of all on process 0; what went wrong first, in one line, or "", the
    same on every process; and the exception of this process.
    """
    failure: Exception | None = None
    result: Any = None
    try:
        result = act()
    except Exception as error:
        failure = error
    own = one_line(failure) if failure else None
    every = [json.loads(word) for word in gather(name, json.dumps([own, result]))]
    problems = [
        problem if len(every) == 1 else f"process {index}: {problem}"
        for index, (problem, _) in enumerate(every)
        if problem is not None
    ]
    verdict = tell(f"{name}/verdict", problems[0] if problems else "")
    return [result for _, result in every], verdict, failure


def one_line(error: BaseException) -> str:
    """An exception's text on one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _get(client: Any, key: str, index: int, timeout_s: float) -> str:
    try:
        return client.blocking_key_value_get(f"memtrain/{key}", int(timeout_s * 1000))
    except Exception as error:  # the service raises its own type, which is not public
        raise PeerLost(
            f"process {index} of {process_count()} did not answer '{key}' "
            f"within {timeout_s:g} s: {str(error).splitlines()[0]}"
        ) from error


def _state() -> Any:
    # No public handle to the coordination service exists; Orbax uses this one as well.
    from jax._src import distributed

    return distributed.global_state
