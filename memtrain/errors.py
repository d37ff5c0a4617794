"""Errors for people, and the exit codes that schedulers act on.

Every error here is printed by the command line as one line (what was wrong, where, what would be
right) and ends the process with its `exit_code`. Anything else is a bug of ours: exit code 1.
"""

DONE = 0
BUG = 1
BAD_INPUT = 2
LOST_PEER = 71
STORAGE_FAILED = 74
PREEMPTED = 75


class MemtrainError(Exception):
    """Base of all errors that a user can act on."""

    exit_code = BAD_INPUT


class BadInput(MemtrainError, ValueError):
    """The user's input is wrong: a recipe, a key, a file, a shape. Exit code 2."""


class CheckpointError(BadInput):
    """No checkpoint is valid, or one does not fit the run that asks for it. Exit code 2."""


class ArtifactError(BadInput):
    """An exported artifact or session is damaged or does not fit. Exit code 2."""


class PeerLost(MemtrainError):
    """Another process of the job died or stalled. Exit code 71: start again."""

    exit_code = LOST_PEER


class StorageFailed(MemtrainError):
    """The disk refused a write: full, read-only, gone. Exit code 74."""

    exit_code = STORAGE_FAILED


class Preempted(MemtrainError):
    """The job was asked to stop and has saved. Exit code 75: put it back in the queue."""

    exit_code = PREEMPTED
