"""What the laws share: one memory under test in the dtypes that they ask for."""

from __future__ import annotations

import dataclasses

from memtrain.description import Dtypes
from memtrain.testing.subject import MakeMemory, Subject


BFLOAT16 = Dtypes(compute="bfloat16", matmul="bfloat16", state="bfloat16")
"""Float32 parameters, everything else in bfloat16."""


@dataclasses.dataclass
class Bench:
    """Hands out subjects; each is built and compiled once."""

    make_memory: MakeMemory
    dim: int
    seed: int
    length: int
    slow: bool
    _subjects: dict[Dtypes, Subject] = dataclasses.field(default_factory=dict)

    def subject(self, dtypes: Dtypes = Dtypes()) -> Subject:  # noqa: B008 (frozen)
        if dtypes not in self._subjects:
            self._subjects[dtypes] = Subject(
                self.make_memory,
                dtypes,
                dim=self.dim,
                seed=self.seed,
                length=self.length,
                optimized=self.slow,
            )
        return self._subjects[dtypes]
