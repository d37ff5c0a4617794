"""Which step directories there are, which are kept, and how one is removed without a lie.

Names in `checkpoints/`: `STEP` is complete; `STEP.saving` is being written; `STEP.deleting` is on
its way out; `STEP.invalid` failed its digests and was moved aside when the step was saved again.
A rename is the one atomic step of each change, so no crash leaves a half step under a plain number.
"""

import os
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from memtrain.train import failpoint
from memtrain.train.manifest import sync_directory


SAVING = ".saving"
DELETING = ".deleting"
INVALID = ".invalid"
_STEP = re.compile(r"0|[1-9][0-9]{0,17}")
_LEFTOVER = re.compile(r"(0|[1-9][0-9]{0,17})(\.saving|\.deleting)")


def list_steps(directory: Path) -> tuple[list[int], dict[str, str]]:
    """Candidate steps, oldest first, and what else lies there, by name with why it is none."""
    steps: list[int] = []
    others: dict[str, str] = {}
    entries = sorted(os.scandir(directory), key=lambda e: e.name) if directory.is_dir() else []
    for entry in entries:
        if _STEP.fullmatch(entry.name):
            if entry.is_symlink():
                others[entry.name] = "a symbolic link, not a directory"
            elif not entry.is_dir():
                others[entry.name] = "a file, not a directory"
            else:
                steps.append(int(entry.name))
        elif _LEFTOVER.fullmatch(entry.name):
            what = "save" if entry.name.endswith(SAVING) else "deletion"
            others[entry.name] = f"an unfinished {what}"
        elif entry.is_dir() and INVALID not in entry.name:
            others[entry.name] = "not the name of a step"
    return sorted(steps), others


def has_checkpoints(directory: Path) -> bool:
    """Whether a run would resume from here: there is a step, be it valid or not."""
    return bool(list_steps(directory)[0])


def doomed(steps: Iterable[int], *, keep: int, keep_every_steps: int | None) -> list[int]:
    """Steps that the policy lets go: not of the `keep` newest, nor a multiple kept for ever."""
    ordered = sorted(steps)
    return [
        step for step in ordered[:-keep] if not (keep_every_steps and step % keep_every_steps == 0)
    ]


def delete_step(directory: Path, step: int) -> None:
    """Remove a step: first its name, durably, then its files. Raises OSError."""
    going = directory / f"{step}{DELETING}"
    if going.exists():
        shutil.rmtree(going)
    os.rename(directory / str(step), going)
    sync_directory(directory)
    failpoint.reach("checkpoint.step_unlisted")
    remove_tree(going)


def remove_tree(root: Path) -> None:
    """`rm -r`, with a failpoint in the middle."""
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
        failpoint.reach("checkpoint.step_half_deleted")
    os.rmdir(root)


def sweep(directory: Path) -> list[str]:
    """Remove what killed saves and deletions left; only the one writer of a run may call this."""
    swept: list[str] = []
    for entry in list(os.scandir(directory)):
        if _LEFTOVER.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
            swept.append(entry.name)
    return sorted(swept)


def discard(saving: Path, patience_s: float = 2.0) -> None:
    """Remove a failed save; what cannot go now goes before the next save. Raises nothing.

    A save has many writers, and those that did not fail may go on for a moment.
    """
    deadline = time.monotonic() + patience_s
    while saving.exists():
        shutil.rmtree(saving, ignore_errors=True)
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)


def move_aside(directory: Path, step: int) -> str:
    """Give an invalid step another name, to free its own and keep the evidence; the new name."""
    number = 0
    while True:
        name = f"{step}{INVALID}" + (f"-{number}" if number else "")
        if not os.path.lexists(directory / name):
            os.rename(directory / str(step), directory / name)
            return name
        number += 1
