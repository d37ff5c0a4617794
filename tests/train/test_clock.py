"""The clock of a run, on a clock that the tests move by hand."""

import mmap
import resource
import sys
from pathlib import Path

import pytest

from memtrain.train.clock import Clock, format_seconds, resident_bytes


class Hand:
    """`time.perf_counter`, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def move(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Hand:
    made = Hand()
    monkeypatch.setattr("time.perf_counter", made)
    return made


def test_laps_leave_the_pauses_out(hand: Hand):
    clock = Clock()
    hand.move(3)
    with clock.pause("evaluation"):
        hand.move(100)
    hand.move(4)
    assert clock.lap() == 3 + 4
    # A lap begins where the last one ended, and may hold several pauses or end with one.
    hand.move(1)
    with clock.pause("checkpoint"):
        hand.move(20)
    with clock.pause("evaluation"):
        hand.move(50)
    assert clock.lap() == 1
    assert clock.lap() == 0
    hand.move(2)
    assert clock.lap() == 2
    assert clock.elapsed() == 3 + 100 + 4 + 1 + 20 + 50 + 2
    assert dict(clock.paused) == {"evaluation": 150, "checkpoint": 20}


def test_a_pause_that_ends_in_an_error_is_a_pause(hand: Hand):
    clock = Clock()
    hand.move(1)
    with pytest.raises(OSError), clock.pause("checkpoint"):
        hand.move(9)
        raise OSError
    assert clock.lap() == 1
    assert dict(clock.paused) == {"checkpoint": 9}


def test_goodput_is_the_share_of_the_steps(hand: Hand):
    clock = Clock()
    assert 0 <= clock.goodput() <= 1  # nothing has happened: any share, but no division by zero
    hand.move(6)
    assert clock.goodput() == 1
    clock.lap()
    with clock.pause("evaluation"):
        hand.move(2)
    assert clock.goodput() == 6 / 8
    with clock.pause("checkpoint"):
        hand.move(4)
    assert clock.goodput() == 6 / 12
    hand.move(12)
    assert clock.goodput() == 18 / 24


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0s"),
        (8, "8s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (200, "3m20s"),
        (3599, "59m59s"),
        (3599.7, "1h00m"),
        (2 * 3600 + 5 * 60 + 59, "2h05m"),
        (86_399, "23h59m"),
        (86_399.9, "1d00h"),
        (4 * 86_400 + 3 * 3600 + 1799, "4d03h"),
        (100 * 86_400, "100d00h"),
    ],
)
def test_seconds_for_people(seconds: float, expected: str):
    assert format_seconds(seconds) == expected


def test_resident_bytes_grow_by_what_is_written():
    size = 64 * 2**20
    before = resident_bytes()
    # Pages of its own: an allocation might be served from what the process has freed before.
    with mmap.mmap(-1, size) as pages:
        pages.write(b"x" * size)
        grown = resident_bytes() - before
    assert 0 < before < 2**40
    # Other threads may give memory back meanwhile.
    assert grown > 48 * 2**20 or not sys.platform.startswith("linux")


def test_resident_bytes_are_what_the_system_says():
    found = resident_bytes()
    status = Path("/proc/self/status")
    if status.exists():
        line = next(s for s in status.read_text().splitlines() if s.startswith("VmRSS"))
        assert found == pytest.approx(int(line.split()[1]) * 1024, rel=0.1)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        assert found == pytest.approx(peak, rel=0.1)
