"""Who may write a run directory: one job at a time."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path

from memtrain.errors import BadInput, StorageFailed


LOCK_NAME = "LOCK"
# The job's name under the usual schedulers, so that the refusal says what to cancel.
_JOB_VARIABLES = ("SLURM_JOB_ID", "JOB_NAME", "PBS_JOBID", "LSB_JOBID")


class RunLock:
    """An exclusive lock on a directory, held until `release` or the death of the process.

    The kernel holds it (`flock`), so a killed job leaves none behind: the file stays, with the name
    of the last holder in it, and the next job takes it over. Across hosts it holds where the shared
    filesystem passes `flock` on (NFSv4, Lustre mounted with `flock`, GPFS); a filesystem without
    locks is reported on stderr and the lock is then advice only.
    """

    def __init__(self, directory: Path):
        self.path = Path(directory) / LOCK_NAME
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def acquire(self) -> "RunLock":
        """Take the lock; BadInput naming the holder (host, pid, job, since) if it is taken."""
        if self.held:
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise StorageFailed(f"{self.path}: cannot be opened for locking: {error}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                holder = _holder(descriptor)
                os.close(descriptor)
                raise BadInput(
                    f"{self.path.parent} is being written by {holder}: "
                    "stop that job first, or choose another run directory"
                ) from None
            print(
                f"{self.path}: this filesystem has no locks ({error.strerror}); "
                "make sure that only one job writes here",
                file=sys.stderr,
            )
        _sign(descriptor)
        self._descriptor = descriptor
        # A forked data worker that outlives us must not keep the lock alive.
        os.register_at_fork(after_in_child=self._forget)
        return self

    def release(self) -> None:
        """Give the lock back; harmless when not held."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _forget(self) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "RunLock":
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def _sign(descriptor: int) -> None:
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": int(time.time())}
    for variable in _JOB_VARIABLES:
        if os.environ.get(variable):
            owner["job"] = f"{variable}={os.environ[variable]}"
            break
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(owner) + "\n").encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["since"]))
        job = f", {owner['job']}" if "job" in owner else ""
        return f"pid {int(owner['pid'])} on {owner['host']}{job} since {since}"
    except (ValueError, KeyError, TypeError, OverflowError):
        return "another process, which has not signed the lock yet"
