"""What a run read, in a form that a later run can be held to."""

from collections.abc import Mapping
from typing import Any

from memtrain.errors import BadInput


def check_fingerprint(stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to go on with data that is not what the run was reading.

    Raises:
        BadInput: naming every field that differs, with both values.
    """
    differences = [
        f"{name} was {_show(stored, name)}, is {_show(current, name)}"
        for name in sorted(stored.keys() | current.keys())
        if name not in stored or name not in current or stored[name] != current[name]
    ]
    if differences:
        raise BadInput(
            "the run was reading other data: " + "; ".join(differences) + ". Give the same data"
            " and settings, or another run directory"
        )


def _show(fields: Mapping[str, Any], name: str) -> str:
    if name not in fields:
        return "not known"
    text = repr(fields[name])
    return text if len(text) <= 40 else f"{text[:20]}...{text[-1]}"
