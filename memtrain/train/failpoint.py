"""Named places at which a test kills the process, to prove that a crash there loses nothing.

`MEMTRAIN_FAILPOINT=name` kills the process with SIGKILL the first time it reaches `name`, and
`name@3` the third time. Unset, which is always outside tests, `reach` is one dictionary lookup.
"""

import os
import signal
from collections import Counter


VARIABLE = "MEMTRAIN_FAILPOINT"
_times_reached: Counter[str] = Counter()


def reach(name: str) -> None:
    """Die here if the environment says so; the places are listed in docs/checkpoints.md."""
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    place, _, times = wanted.partition("@")
    if place != name:
        return
    _times_reached[name] += 1
    if _times_reached[name] >= int(times or 1):
        os.kill(os.getpid(), signal.SIGKILL)
