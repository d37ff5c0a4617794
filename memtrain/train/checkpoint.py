"""The checkpoint store: saves without stopping the training, and restores only what is whole.

A step is written to `STEP.saving/` by Orbax, every file is flushed and digested, the manifest is
written last, and one rename makes it `STEP/`. `docs/checkpoints.md` has the files and the promises.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from memtrain.errors import BadInput, CheckpointError, StorageFailed
from memtrain.train import agree, failpoint, keep, manifest, shards
from memtrain.train.leaves import LeafInfo, check_fit, info, named_leaves
from memtrain.train.manifest import Manifest
from memtrain.train.run_dir import RunLock


PyTree = Any
ARRAYS = "arrays"
# Beside the arrays a step holds Orbax's metadata and our manifest.
_OVERHEAD_BYTES = 1 << 20
_counters: dict[str, Iterator[int]] = defaultdict(itertools.count)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A valid step: `metadata` as saved, `skipped` newer entries by name with the reason."""

    step: int
    directory: Path
    metadata: dict[str, Any]
    skipped: dict[str, str]


def report_on_stderr(line: str) -> None:
    """Where the store tells people what it skipped."""
    print(f"checkpoint: {line}", file=sys.stderr, flush=True)


class CheckpointStore:
    """The steps of one run under `directory` (RUN/checkpoints).

    Use it in a `with` statement, or `close` it: Python refuses to finish a save that is under way
    when the program ends, and its step is then never valid.
    Reading needs nothing. The first `save` (or `sweep`) makes this store the writer: it takes the
    lock in `directory` and removes what killed saves left. In a job of many processes every method
    but `steps`, `metadata` and `leaves` is called by all of them, in the same order.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 3,
        keep_every_steps: int | None = None,
        report: Callable[[str], None] = report_on_stderr,
    ):
        if keep < 1:
            raise BadInput(f"{keep} checkpoints kept: at least 1 is needed to resume from")
        if keep_every_steps is not None and keep_every_steps < 1:
            raise BadInput(f"every {keep_every_steps} steps kept for ever: at least 1")
        self.directory = Path(directory).absolute()  # Orbax takes no other
        self._keep = keep
        self._keep_every_steps = keep_every_steps
        self._report = report if agree.process_index() == 0 else lambda line: None
        self._lock = RunLock(self.directory)
        self._is_writer = False
        self._closed = False
        self._writing: threading.Thread | None = None
        self._importing: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._verified: set[int] = set()
        self._invalid: set[int] = set()

    # Saving

    def save(
        self, step: int, arrays: PyTree, metadata: dict[str, Any], *, wait: bool = False
    ) -> None:
        """Save a tree of jax.Arrays; returns once the arrays may be donated or changed.

        The rest goes on in the background; what fails there is raised by the next `save`, `poll` or
        `close`. Waits for the save before it. A step that is already saved and valid is not written
        again. `metadata` is plain JSON. Raises StorageFailed, with earlier steps as they were;
        BadInput if another job writes here.
        """
        if self._closed:
            raise RuntimeError("this CheckpointStore was closed")
        if step < 0:
            raise ValueError(f"step {step} is negative")
        named = named_leaves(arrays)
        shards.check_savable(named)
        manifest.check_metadata(metadata)
        self._wait()
        if not agree.first_acts(_unique("prepare"), functools.partial(self._prepare, step, named)):
            self._verified.add(step)
            self._report(f"step {step} is already saved and valid; not written again")
            return
        saving = self._path(step, keep.SAVING)
        try:
            response = shards.start_write(saving / ARRAYS, named)
        except OSError as error:
            raise self._storage_failed(step, error) from error
        draft = Manifest(
            step=step,
            files={},
            leaves=shards.describe(named),
            topology=shards.topology(named),
            versions=_versions(),
            metadata=metadata,
        )
        key = _unique("saved")
        self._writing = threading.Thread(
            target=self._finish, args=(response, draft, key), name=f"save-{step}"
        )
        self._writing.start()
        if wait:
            self._wait()

    def poll(self) -> None:
        """Raise what the background save raised, if it has ended; costs nothing otherwise."""
        if self._writing is not None and not self._writing.is_alive():
            self._wait()

    def wait(self) -> None:
        """Return once the background save, if there is one, is valid; raise what it raised."""
        self._wait()

    @property
    def is_saving(self) -> bool:
        """Whether a save goes on in the background."""
        return self._writing is not None and self._writing.is_alive()

    def close(self) -> None:
        """Wait for the background save, give the lock back, and raise what the save raised."""
        try:
            self._wait()
        finally:
            self._closed = True
            self._lock.release()
            if self._importing is not None:
                self._importing.join()

    def sweep(self) -> None:
        """Become the writer now: take the lock, remove what killed saves and deletions left."""
        agree.first_acts(_unique("sweep"), self._become_writer)

    def warm_up(self) -> None:
        """Import Orbax in the background; call it just before the first compilation."""
        self._importing = shards.import_in_background()

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except Exception as error:
            if kind is None:
                raise
            # What ended the block matters more, and is not to be hidden behind this.
            self._report(agree.one_line(error))

    # Reading

    def steps(self) -> list[int]:
        """Steps that have a directory, oldest first; whether they are valid is not checked."""
        return keep.list_steps(self.directory)[0]

    def newest_valid(self) -> Candidate | None:
        """The newest step whose files all have their digests; None if there are no steps at all.

        Reports what it skipped, one line each. Raises CheckpointError if there are steps and none
        is valid: starting afresh over them would lose the work.
        """
        listing = agree.tell(_unique("steps"), json.dumps(keep.list_steps(self.directory)))
        steps, skipped = json.loads(listing)
        for name, reason in skipped.items():
            self._report(f"ignored {self.directory / name}: {reason}")
        for step in reversed(steps):
            reason = self._why_invalid(step)
            if reason is None:
                found = self._manifest(step)
                return Candidate(step, self._path(step), found.metadata, skipped)
            skipped[str(step)] = reason
            self._report(f"skipped step {step}: {reason}")
        if not steps:
            return None
        reasons = "; ".join(f"{step}: {skipped[str(step)]}" for step in reversed(steps))
        raise CheckpointError(
            f"{self.directory} has {len(steps)} checkpoints and none is valid ({reasons}): restore "
            "one from a copy, or start a new run in another directory"
        )

    def metadata(self, step: int) -> dict[str, Any]:
        """The metadata of a step; CheckpointError if its manifest is no good."""
        return self._manifest(step).metadata

    def leaves(self, step: int) -> dict[str, LeafInfo]:
        """Shape and dtype name of every leaf, by name; CheckpointError if the manifest is bad."""
        return _leaf_info(self._manifest(step))

    def restore(self, step: int, abstract: PyTree) -> PyTree:
        """The saved values, bit for bit, in the structure and shardings of `abstract`.

        `abstract` is a tree of ShapeDtypeStruct with shardings on any mesh (without one: the first
        device). Raises CheckpointError if the step is damaged, or naming the leaves that are
        missing, unexpected, or of another shape or dtype.
        """
        return self._restore(step, abstract, partial=False)

    def restore_partial(self, step: int, abstract: PyTree) -> PyTree:
        """Like `restore`, but saved leaves that `abstract` does not name are not read."""
        return self._restore(step, abstract, partial=True)

    # Inside

    def _restore(self, step: int, abstract: PyTree, *, partial: bool) -> PyTree:
        wanted = named_leaves(abstract)
        found = self._manifest(step)
        where = f"checkpoint {self._path(step)}"
        wanted_info = {name: info(leaf) for name, leaf in wanted.items()}
        check_fit(where, _leaf_info(found), wanted_info, partial=partial)
        reason = None if step in self._verified else self._why_invalid(step)
        if reason is not None:
            raise CheckpointError(f"{where} is not valid: {reason}")
        impls = {n: leaf["key_impl"] for n, leaf in found.leaves.items() if "key_impl" in leaf}
        try:
            arrays = shards.read(self._path(step) / ARRAYS, wanted, impls)
        except Exception as error:  # Orbax and TensorStore raise many types
            raise CheckpointError(f"{where} cannot be read: {agree.one_line(error)}") from error
        treedef = jax.tree_util.tree_structure(abstract)
        return jax.tree_util.tree_unflatten(treedef, [arrays[name] for name in wanted])

    def _prepare(self, step: int, named: dict[str, jax.Array]) -> bool:
        """All that must be true before the first byte is written; False if nothing is to write."""
        self._become_writer()
        try:
            if not self._make_room(step):
                return False
            keep.sweep(self.directory)  # what a failed save may have left
            free = shutil.disk_usage(self.directory).free
            needed = shards.num_bytes(named) + _OVERHEAD_BYTES
            if free < needed:
                raise StorageFailed(
                    f"checkpoint of step {step} needs {needed} bytes and {self.directory} has "
                    f"{free} free: free some space, or lower train.keep_checkpoints"
                )
            self._path(step, keep.SAVING).mkdir()
        except OSError as error:
            raise self._storage_failed(step, error) from error
        return True

    def _make_room(self, step: int) -> bool:
        """Free the name of the step if something invalid has it; False if a valid step has it."""
        if not os.path.lexists(self._path(step)):
            return True
        reason = None
        if step not in self._verified:
            reason = self._check(step, share=lambda names: names)
        if reason is None:
            return False
        name = keep.move_aside(self.directory, step)
        self._report(f"step {step} is saved again; the invalid one is kept as {name}: {reason}")
        return True

    def _become_writer(self) -> None:
        if self._is_writer:
            return
        self._lock.acquire()
        try:
            for name in keep.sweep(self.directory):
                self._report(f"removed {name}, left by a process that was killed")
        except OSError as error:
            raise StorageFailed(f"{self.directory} cannot be cleaned up: {error}") from error
        self._is_writer = True

    def _finish(self, response: Any, draft: Manifest, key: str) -> None:
        """The background thread of a save: leaves what fails for the next call to raise."""
        try:
            # Orbax and TensorStore raise many types when a disk refuses; all of them mean that.
            self._agreed(f"{key}/arrays", draft.step, response.result, storage=Exception)
            failpoint.reach("checkpoint.arrays_written")
            self._complete(draft, key)
            self._verified.add(draft.step)
            self._invalid.discard(draft.step)
            if agree.process_index() == 0:
                self._collect_garbage(draft.step)
        except Exception as error:
            self._failure = error
            # On a full disk, what was written in vain is the first thing to go.
            keep.discard(self._path(draft.step, keep.SAVING))

    def _complete(self, draft: Manifest, key: str) -> None:
        """Digest, manifest, rename. Every process digests a share, process 0 does the rest."""
        saving = self._path(draft.step, keep.SAVING)
        names = agree.tell(f"{key}/files", json.dumps(manifest.list_files(saving)))
        digests = self._agreed(
            f"{key}/digests",
            draft.step,
            lambda: manifest.digest_files(saving, _share(json.loads(names)), sync=True),
        )
        agree.forget(f"{key}/files")

        def commit() -> None:
            if agree.process_index() != 0:
                return
            files = {
                name: manifest.FileDigest(*digest)
                for part in digests
                for name, digest in part.items()
            }
            manifest.write(saving, dataclasses.replace(draft, files=files))
            failpoint.reach("checkpoint.manifest_written")
            os.rename(saving, self._path(draft.step))
            manifest.sync_directory(self.directory)
            failpoint.reach("checkpoint.step_listed")

        self._agreed(f"{key}/commit", draft.step, commit)

    def _agreed(
        self, key: str, step: int, act: Callable[[], Any], storage: type[Exception] = OSError
    ) -> list[Any]:
        """All processes act; StorageFailed on all if one fails. Other failures are our bugs."""
        results, problem, failure = agree.all_act(key, act)
        if failure is not None and not isinstance(failure, storage):
            raise failure
        if problem:
            raise self._storage_failed(step, problem) from failure
        return results

    def _collect_garbage(self, saved: int) -> None:
        """Delete what the policy lets go: steps with our manifest, never the one just saved."""
        valid = [step for step in self.steps() if step not in self._invalid]
        policy = {"keep": self._keep, "keep_every_steps": self._keep_every_steps}
        for step in keep.doomed(valid, **policy):
            if step == saved:
                continue
            try:
                self._manifest(step)
            except CheckpointError as error:
                self._invalid.add(step)
                self._report(f"step {step} is old but not deleted: {error}")
                continue
            try:
                keep.delete_step(self.directory, step)
            except OSError as error:
                raise StorageFailed(f"old checkpoint {step} cannot be deleted: {error}") from error
            self._verified.discard(step)

    def _why_invalid(self, step: int) -> str | None:
        """Verify a step, every process its share of the files; the first reason, or None."""
        name = _unique("verified")
        every = agree.gather(name, self._check(step, share=_share) or "")
        first = next((reason for reason in every if reason), "")
        reason = agree.tell(f"{name}/verdict", first) or None
        (self._verified.discard if reason else self._verified.add)(step)
        (self._invalid.add if reason else self._invalid.discard)(step)
        return reason

    def _check(self, step: int, *, share: Callable[[list[str]], list[str]]) -> str | None:
        try:
            return manifest.verify(self._path(step), self._manifest(step), share=share)
        except CheckpointError as error:
            return str(error)

    def _manifest(self, step: int) -> Manifest:
        if not self._path(step).is_dir():
            known = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self.directory} has no step {step}; it has: {known}")
        return manifest.read(self._path(step))

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _path(self, step: int, suffix: str = "") -> Path:
        return self.directory / f"{int(step)}{suffix}"

    def _storage_failed(self, step: int, cause: BaseException | str) -> StorageFailed:
        cause = cause if isinstance(cause, str) else agree.one_line(cause)
        return StorageFailed(
            f"checkpoint of step {step} in {self.directory} was not written: {cause}; "
            "earlier checkpoints are intact"
        )


def _leaf_info(found: Manifest) -> dict[str, LeafInfo]:
    return {
        name: LeafInfo(tuple(leaf["shape"]), leaf["dtype"]) for name, leaf in found.leaves.items()
    }


def _share(names: list[str]) -> list[str]:
    return names[agree.process_index() :: agree.process_count()]


def _unique(what: str) -> str:
    """A name for one exchange between processes: all make the same calls in the same order."""
    return f"checkpoint/{what}/{next(_counters[what])}"


@functools.cache
def _versions() -> dict[str, str]:
    names = ("memtrain", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore")
    versions = {"python": platform.python_version()}
    for name in (*names, "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
