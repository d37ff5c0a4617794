"""Words between the processes of a job, through the coordination service.

Host-side and named, so it may be used from a background thread: a device collective there would
interleave with the training step's own. With one process everything here is free.
"""

from typing import Any

from memtrain.errors import PeerLost


TIMEOUT_S = 1200.0


def process_index() -> int:
    """Index of this process in the job; does not start a backend."""
    return _state().process_id or 0


def process_count() -> int:
    """Processes in the job; does not start a backend."""
    return _state().num_processes or 1


def gather(name: str, word: str, timeout_s: float = TIMEOUT_S) -> list[str]:
    """Every process's word, by process index.

    `name` is used once in the life of the job. Raises PeerLost naming who did not answer in time.
    """
    count = process_count()
    if count == 1:
        return [word]
    client = _state().client
    client.key_value_set(f"memtrain/{name}/{process_index()}", word)
    return [_get(client, name, index, timeout_s) for index in range(count)]


def tell(name: str, word: str | None, timeout_s: float = TIMEOUT_S) -> str:
    """The word of process 0, on every process; the others pass None.

    `name` is used once in the life of the job. Raises PeerLost if process 0 does not answer.
    """
    if process_count() == 1:
        assert word is not None
        return word
    client = _state().client
    if process_index() == 0:
        assert word is not None
        client.key_value_set(f"memtrain/{name}/0", word)
        return word
    return _get(client, name, 0, timeout_s)


def _get(client: Any, name: str, index: int, timeout_s: float) -> str:
    try:
        return client.blocking_key_value_get(f"memtrain/{name}/{index}", int(timeout_s * 1000))
    except Exception as error:  # the service raises its own type, which is not public
        raise PeerLost(
            f"process {index} of {process_count()} did not answer '{name}' "
            f"within {timeout_s:g} s: {str(error).splitlines()[0]}"
        ) from error


def _state() -> Any:
    # No public handle to the coordination service exists; Orbax uses this one as well.
    from jax._src import distributed

    return distributed.global_state
