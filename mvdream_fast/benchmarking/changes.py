"""What got slower and what got faster between two results files.

Two files are two runs, often of two machines, so seconds are not compared where it can be helped: each of our
contestants is held to the reference of its own contest, which took turns with it, or to the machine's limit of its own
run. A change counts once it is larger than the spread of all that it is made of.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mvdream_fast.benchmarking.figures import number, ratio, seconds
from mvdream_fast.benchmarking.results import Contest, Results, Row

By = Literal["reference", "limit", "seconds"]


@dataclass(frozen=True)
class Change:
    """One of our contestants in both files. factor: how many times the time it takes now, by the measure `by`.

    spread: the relative uncertainty of the factor, half of the interquartile ranges of what it is made of, together.
    """

    contest: str
    name: str
    before: float
    after: float
    factor: float
    spread: float
    by: By

    @property
    def at_least(self) -> float:
        """The factor without what may be noise: 1 where all of it may be."""
        if self.factor >= 1:
            return max(1.0, self.factor / (1 + self.spread))
        return min(1.0, self.factor * (1 + self.spread))


@dataclass(frozen=True)
class Difference:
    """Two files: what both have, what only one has, and what could not be compared, with the reason."""

    changes: tuple[Change, ...]
    gone: tuple[str, ...]
    new: tuple[str, ...]
    apart: tuple[str, ...]

    def slower(self, bound: float) -> list[Change]:
        """What is slower past the bound, and past its own spread, the worst first."""
        found = [change for change in self.changes if change.at_least > bound]
        return sorted(found, key=lambda change: -change.factor)


def difference(a: Results, b: Results) -> Difference:
    """From `a`, the older one, to `b`."""
    before, after = ({(c.name, r.name): (c, r) for c in x.contests for r in c.rows if r.role == "ours"} for x in (a, b))
    changes, apart = [], []
    for key in sorted(before.keys() & after.keys()):
        change = _change(before[key], after[key], a.machine == b.machine)
        changes += [change] if change else []
        apart += [] if change else [_label(*key)]
    gone, new = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
    return Difference(tuple(changes), tuple(_label(*k) for k in gone), tuple(_label(*k) for k in new), tuple(apart))


def conditions(a: Results, b: Results) -> dict[str, tuple[str, str]]:
    """What else than the code differs: the machine's parts, versions, threads; None is what one of them lacks."""
    before, after = ({**dataclasses.asdict(x.machine), **x.versions} for x in (a, b))
    names = dict.fromkeys([*before, *after])
    pairs = {name: (str(before.get(name)), str(after.get(name))) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def report(found: Difference, bound: float) -> str:
    """The difference as lines for a terminal: slower first, then faster, then how many stayed as they were."""
    past, moved = found.slower(bound), [change for change in found.changes if change.at_least != 1]
    slower = sorted((c for c in moved if c.factor > 1 and c not in past), key=lambda change: -change.factor)
    faster = sorted((c for c in moved if c.factor < 1), key=lambda change: change.factor)
    lines = _section(f"slower, past the bound of {ratio(bound)}", past)
    lines += _section("slower, within the bound", slower) + _section("faster", faster)
    lines.append(f"{len(found.changes) - len(moved)} of {len(found.changes)} did not move by more than their spread")
    for names, what in ((found.gone, "only in the first"), (found.new, "only in the second")):
        lines += [f"{what}: {'; '.join(names)}"] if names else []
    if found.apart:
        lines.append(f"not comparable (other machines, and neither a reference nor a limit): {'; '.join(found.apart)}")
    return "\n".join(lines)


def _section(title: str, changes: Sequence[Change]) -> list[str]:
    return [f"{title}:", *(f"  {_line(change)}" for change in changes)] if changes else []


def _line(change: Change) -> str:
    factor = change.factor if change.factor >= 1 else 1 / change.factor
    word = "times the time" if change.factor >= 1 else "times as fast"
    measure = {"reference": "against the reference", "limit": "against the machine's limit", "seconds": "in seconds"}
    return (
        f"{_label(change.contest, change.name)}: {number(factor)} {word} {measure[change.by]} "
        f"(+- {100 * change.spread:.0f} %; {seconds(change.before)} -> {seconds(change.after)})"
    )


def _label(contest: str, name: str) -> str:
    return contest if name == "ours" else f"{contest}: {name}"


def _change(before: tuple[Contest, Row], after: tuple[Contest, Row], same_machine: bool) -> Change | None:
    """By the reference where both have the same one, else by the limit, else by seconds on one machine."""
    (was_in, was), (is_in, now) = before, after
    old, new = was_in.beside(was, "reference"), is_in.beside(now, "reference")
    rows = [was, now]
    if old and new and old.name == new.name:
        by, factor = "reference", (now.median_s / new.median_s) / (was.median_s / old.median_s)
        rows += [old, new]
    elif was.of_limit and now.of_limit:
        by, factor = "limit", was.of_limit / now.of_limit
    elif same_machine:
        by, factor = "seconds", now.median_s / was.median_s
    else:
        return None
    spread = math.sqrt(sum((row.spread_s / row.median_s / 2) ** 2 for row in rows))
    return Change(was_in.name, was.name, was.median_s, now.median_s, factor, spread, by)
