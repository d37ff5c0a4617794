"""What a check of the laws says: a broken law by name, case and leaf, or a table of what held."""

from __future__ import annotations

import dataclasses
from typing import Literal


NUMBERS = {
    "moves": 0,
    "split": 1,
    "gradient": 2,
    "reset": 3,
    "padding": 4,
    "bytes": 5,
    "sharding": 6,
    "context_parallel": 7,
    "save_restore": 8,
    "fork_rollback": 9,
    "long_runs": 10,
}
"""The laws by name. `moves` is what all others stand on: that the memory does something."""


class LawBroken(AssertionError):
    """A memory breaks a law: which, in what case, at which leaf, and by how much."""

    def __init__(self, law: str, case: str, leaf: str, error: str):
        self.law, self.case, self.leaf, self.error = law, case, leaf, error
        super().__init__(f"law {NUMBERS[law]} ({law}) is broken; case: {case}; at {leaf}: {error}")


@dataclasses.dataclass
class Outcome:
    """What became of one law."""

    law: str
    status: Literal["holds", "not offered", "not checked"] = "holds"
    checks: int = 0
    """Comparisons made."""
    worst: float = 0.0
    """Largest error over its tolerance; bitwise laws leave it at 0."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """What was left out, and why."""

    def __str__(self) -> str:
        line = f"{NUMBERS[self.law]:>2} {self.law:<16} {self.status:<11}"
        if self.checks:
            line += f" {self.checks:>4} checks, worst error {self.worst:.0e} of the tolerance"
        return "; ".join([line, *self.notes])


@dataclasses.dataclass
class Report:
    """The outcome of every law asked for."""

    memory: str
    outcomes: list[Outcome]

    def __getitem__(self, law: str) -> Outcome:
        return next(outcome for outcome in self.outcomes if outcome.law == law)

    def __str__(self) -> str:
        return "\n".join([self.memory, *map(str, self.outcomes)])
