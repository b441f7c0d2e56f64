"""How measured numbers are written, on pages, in tables and in terminals: three digits, one space, a unit."""

from collections.abc import Iterator

from mvdream_fast.benchmarking.results import Contest, Goal

UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9))


def number(value: float) -> str:
    """Three digits, with commas: 0.0123, 1.23, 12.3, 1,230."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    digits = max(0, 2 - _exponent(rounded))
    return f"{rounded:,.{digits}f}"


def amount(value: float) -> str:
    """A count of work, whole where it is: 10,000."""
    return f"{value:,.0f}" if value == int(value) else number(value)


def seconds(value: float) -> str:
    """A duration in the largest unit that it is at least one of: 1.23 s, 45.6 ms, 780 us, 176 ns."""
    rounded = float(f"{value:.3g}")
    unit, size = next(((unit, size) for unit, size in UNITS if rounded >= size * (1 - 1e-9)), UNITS[-1])
    return f"{number(value / size)} {unit}"


def ratio(value: float) -> str:
    """1.37x."""
    return f"{number(value)}x"


def share(value: float) -> str:
    """A part of one as 37 %."""
    return f"{value:.2g} %" if (value := value * 100) < 10 else f"{value:.0f} %"


def memory(value: float) -> str:
    """Megabytes."""
    return f"{value:,.0f} MB"


def reached(goal: Goal) -> str:
    """What came of a goal, in its unit."""
    if goal.unit == "s":
        return seconds(goal.got)
    return ratio(goal.got) if goal.unit == "x" else f"{number(goal.got)} {goal.unit}"


def shown(contest: Contest) -> Iterator[str]:
    """Every figure of speed that a contest's table shows, as it is written there."""
    for row in () if contest.scaling else contest.rows:
        yield seconds(row.median_s)
        yield from (ratio(lead) for lead in (contest.lead(row),) if lead is not None)
    yield from (reached(goal) for goal in contest.goals)
    for points in contest.scaling.points.values() if contest.scaling else ():
        yield from (seconds(taken) for _, taken in points)


def _exponent(value: float) -> int:
    return int(f"{value:e}".partition("e")[2])
