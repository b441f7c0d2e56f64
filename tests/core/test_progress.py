"""What is due now and then, by a clock that the tests move."""

import pytest

from mvdream_fast.core import progress
from mvdream_fast.core.progress import Every, Pace


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 50.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_due_after_the_seconds_and_never_for_none(clock):
    every, never = Every(10), Every(0)
    clock.now += 10
    assert not every.due()
    clock.now += 0.1
    assert every.due()
    assert every.due()  # until it begins again
    every.begin()
    assert not every.due()
    clock.now += 1e9
    assert not never.due()


def test_a_line_every_so_often_and_at_the_end(clock):
    """A run that goes on at step 100 of 110: two seconds a step, a line after more than five."""
    pace, lines = Pace(5), []
    for done in range(101, 111):
        clock.now += 2
        lines.append(pace(done, 110))
    assert [i for i, line in enumerate(lines) if line] == [2, 5, 8, 9]
    assert lines[2] == "step 103/110, 2.00 s/step, 14 s left"
    assert lines[9] == "step 110/110, 2.00 s/step, 0 s left"


def test_long_times_are_minutes(clock):
    pace = Pace(5)
    clock.now += 30
    assert pace(1, 1000) == "step 1/1000, 30.00 s/step, 499.5 min left"
