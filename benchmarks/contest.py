"""A contest: one piece of work, done in turns by everybody who can, after a proof that all of them answer the same.

A bench declares its contestants, the work and the goals, and calls `Contest.run` (or `op`, or `scale`, which call it).
What was measured lies in `benchmark.extra_info["contest"]`, beside the machine's limit at that minute. Under
`--benchmark-disable` sizes are tiny and only the proof is left: that is the smoke run of `make test`.
"""

import functools
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from contestants import Apart, Call, Contestant, Here, Place, Unavailable, itself, reason_of
from limit import least_seconds, machine_limit
from torch.utils._pytree import tree_leaves

What = Literal["forward", "forward+backward", "step", "run", "call"]
Work = Mapping[str, float]
Rows = Mapping[str, Mapping[str, Any]]
smoke = False  # conftest.py sets it before any bench is imported
BUDGET_S = float(os.environ.get("MVDREAM_FAST_BENCH_SECONDS", 1.5))  # of a contest's turns, all contestants together
WARM_UP, LEAST_TURNS, MOST_TURNS, TURN_S = 2, 3, 30, 5e-3
TOLERANCE = 1e-4
BACKWARD = (False, True)


def sizes(full: Sequence[Any], tiny: Sequence[Any]) -> Sequence[Any]:
    """The parameters of a bench: those to be measured, or those of the smoke run."""
    return tiny if smoke else full


def size(full: Any, tiny: Any) -> Any:
    return tiny if smoke else full


class Disagreement(AssertionError):
    """A contestant answers something else than the reference: its time would mean nothing."""


def agree(name: str, wanted: Any, got: Any, tolerance: float = TOLERANCE) -> None:
    """Raises Disagreement unless both hold tensors of the same shapes and, nearly, the same values.

    Floats may differ by `tolerance` of the largest of theirs; whole numbers and booleans may not differ at all.
    """
    wanted, got = tree_leaves(wanted), tree_leaves(got)
    if len(wanted) != len(got):
        raise Disagreement(f"{name} answers {len(got)} values, the others {len(wanted)}")
    for i, (a, b) in enumerate(zip(wanted, got, strict=True)):
        a, b = (torch.as_tensor(x).detach().cpu() for x in (a, b))
        if a.shape != b.shape:
            raise Disagreement(f"value {i} of {name} is {tuple(b.shape)}, the others' {tuple(a.shape)}")
        if not a.is_floating_point():
            if not torch.equal(a, b.to(a.dtype)):
                raise Disagreement(f"value {i} of {name} differs in {(a != b).sum().item()} of {a.numel()} places")
        elif a.numel():
            error, largest = (a.double() - b.double()).abs().max().item(), a.abs().max().item()
            if not error <= tolerance * largest:
                raise Disagreement(f"value {i} of {name} is {error:.2g} off, {tolerance * largest:.2g} is allowed")


@dataclass(frozen=True)
class Goal:
    """What should come out: `got` of the rows, at least the goal or at most; left out where a contestant is missing."""

    what: str
    goal: float
    got: Callable[[Rows, Work], float]
    names: tuple[str, ...]  # contestants that it reads
    unit: str = "x"
    at_most: bool = False

    def record(self, rows: Rows, work: Work) -> dict[str, Any] | None:
        if any(name not in rows for name in self.names):
            return None
        got = self.got(rows, work)
        bound = "at most" if self.at_most else "at least"
        what = f"{self.what}: {bound} {self.goal:g}{'' if self.unit == 'x' else ' '}{self.unit}"
        met = got <= self.goal if self.at_most else got >= self.goal
        return {"what": what, "goal": self.goal, "got": got, "unit": self.unit, "met": met}


def faster(goal: float, than: str, who: str = "ours") -> Goal:
    """So many times the speed of another contestant."""
    got = lambda rows, _: rows[than]["median_s"] / rows[who]["median_s"]  # noqa: E731
    return Goal(f"speed of {who} against {than}", goal, got, (than, who))


def slower(goal: float, than: str, who: str = "ours") -> Goal:
    """At most so many times the time of another contestant."""
    got = lambda rows, _: rows[who]["median_s"] / rows[than]["median_s"]  # noqa: E731
    return Goal(f"time of {who} against {than}", goal, got, (than, who), at_most=True)


def within(seconds: float, who: str = "ours") -> Goal:
    return Goal(f"time of {who}", seconds, lambda rows, _: rows[who]["median_s"], (who,), "s", at_most=True)


def near_limit(share: float, who: str = "ours") -> Goal:
    """So much of what the machine allows."""
    return Goal(f"{who}, share of the machine's limit", share, lambda rows, _: rows[who]["of_limit"], (who,))


def memory_a(unit: str, most: float, who: str = "ours") -> Goal:
    """At most so many bytes a unit of the work, `samples` for example, beyond what is held before and `held_bytes`."""

    def got(rows: Rows, work: Work) -> float:
        return (rows[who]["peak_mb"] * 2**20 - work.get("held_bytes", 0)) / work[unit]

    return Goal(f"memory of {who} by {unit}", most, got, (who,), "B", at_most=True)


def named(who: str, value: float, x: str) -> str:
    """What `scale` calls a contestant; `_scaling` reads it again."""
    return f"{who}, {value:.10g} {x}"


def even(x: str, few: float, many: float, most: float, who: str = "ours") -> Goal:
    """A unit of `x` costs at most so many times in small work what it costs in large: of contestants of `scale`."""
    names = tuple(named(who, n, x) for n in (few, many))

    def got(rows: Rows, _: Work) -> float:
        return rows[names[0]]["median_s"] / few / (rows[names[1]]["median_s"] / many)

    return Goal(f"cost by {x}, {few:.10g} against {many:.10g}", most, got, names, at_most=True)


@dataclass
class Entry:
    """A contestant in its place, with the seconds of its turns."""

    contestant: Contestant
    place: Place
    peak_mb: float | None = None
    n_calls: int = 1
    turns: int = LEAST_TURNS
    seconds: list[float] = field(default_factory=list)

    def takes_part(self, turn: int, n_turns: int) -> bool:
        """Whoever has fewer turns than others has them spread over the contest."""
        return (turn + 1) * self.turns // n_turns > turn * self.turns // n_turns


class Contest:
    """What the fixture `contest` gives a bench."""

    def __init__(self, benchmark: Any, threads: int, say: Callable[[str], None] = print):
        self.benchmark, self.threads, self.say = benchmark, threads, say

    def op(
        self,
        group: str,
        functions: Mapping[str, Callable[..., Any]],
        leaves: Sequence[torch.Tensor],
        backward: bool,
        differentiable: Sequence[int] | None = None,
        others: Sequence[Contestant] = (),
        **rest: Any,
    ) -> None:
        """Functions of the same tensors: forward under no_grad, or with all gradients under one random cotangent.

        Args:
            leaves: the functions' arguments. `differentiable`: which of them have a gradient, else all.
            others: contestants that are no such functions.
            rest: of `run`.
        """
        wanted = range(len(leaves)) if differentiable is None else differentiable
        contestants = [
            Contestant(name, functools.partial(differentiated, f, leaves, backward, wanted))
            for name, f in functions.items()
        ]
        self.run(group, passes(backward), [*contestants, *others], **rest)

    def scale(
        self,
        group: str,
        what: What,
        x: str,
        makes: Mapping[float, Mapping[str, Callable[[], Call]]],
        work: Callable[[float], Work] | None = None,
        **rest: Any,
    ) -> dict[str, Any] | None:
        """Cost against work: contestants by the value of `x` (samples, resolution, views, tokens, threads...).

        Those of one value are compared with each other; where `x` is `threads` it is the number that they have.
        """
        contestants = [
            Contestant(
                named(name, value, x),
                make,
                case=None if x == "threads" else value,
                work=work(value) if work else None,
                threads=int(value) if x == "threads" else None,
            )
            for value, by_name in makes.items()
            for name, make in by_name.items()
        ]
        largest = max(makes)
        rest.setdefault("work", work(largest) if work else {x: largest})
        return self.run(group, what, contestants, scaling=x, **rest)

    def run(
        self,
        group: str,
        what: What,
        contestants: Mapping[str, Callable[[], Call]] | Iterable[Contestant],
        work: Work,
        tolerance: float = TOLERANCE,
        goals: Sequence[Goal] = (),
        budget_s: float = BUDGET_S,
        scaling: str | None = None,
        seen: Callable[[Any], Any] = itself,
        once: bool = False,
    ) -> dict[str, Any] | None:
        """Proves that all agree, then lets them take turns; what came out goes to `extra_info["contest"]`.

        Args:
            contestants: builders of calls by name, or Contestants. The first of a case is the one that others are
                compared with: the reference, where there is one.
            work: what a call does; `flop`, `bytes` (read and written once) and `gathered_bytes` make GFLOP/s, GB/s and
                the distance from the machine's limit, anything else is for the reader.
            budget_s: seconds for the turns of all; everybody has at least LEAST_TURNS.
            seen: what of an answer is compared, for contestants that do not say it themselves.
            once: calls so long that the one which proves agreement warms up, and one more is timed.

        Raises:
            Disagreement: somebody answers something else.
        """
        contestants = _contestants(contestants, seen)
        if unknown := {name for goal in goals for name in goal.names} - {c.name for c in contestants}:
            raise ValueError(f"{group}: a goal is about {', '.join(unknown)}, which is no contestant")
        self.benchmark.group = f"{group} {what}"
        entries: list[Entry] = []
        skipped: list[dict[str, str]] = []
        try:
            if smoke:
                self.benchmark.pedantic(self._enter, (contestants, tolerance, entries, skipped), rounds=1)
                return None
            self._enter(contestants, tolerance, entries, skipped)
            self._take_turns(entries, budget_s, once)
            limits = [machine_limit(e.contestant.threads or self.threads, e.contestant.work or work) for e in entries]
        finally:
            for entry in entries:
                entry.place.close()
        rows = [_row(entry, entry.contestant.work or work, limit) for entry, limit in zip(entries, limits, strict=True)]
        by_name = {row["name"]: row for row in rows}
        record = {
            "group": group,
            "what": what,
            "work": dict(work),
            "rows": rows,
            "skipped": skipped,
            "goals": [x for goal in goals if (x := goal.record(by_name, work))],
            "scaling": _scaling(scaling, rows) if scaling else None,
            "limit": machine_limit(self.threads, work),
        }
        self.benchmark.extra_info["contest"] = record
        for line in told(record):
            self.say(line)
        return record

    def _enter(self, contestants, tolerance, entries: list[Entry], skipped: list[dict[str, str]]) -> None:
        """Builds everybody who can run here and proves that they agree; who cannot is noted with the reason."""
        for contestant in contestants:
            try:
                place = (Apart if contestant.apart and not smoke else Here)(contestant, self.threads)
                entries.append(Entry(contestant, place))
            except (Unavailable, ImportError) as error:
                _note(contestant, error, skipped)
        wanted: dict[Any, Any] = {}
        for entry in list(entries):
            contestant = entry.contestant
            try:
                output = entry.place.output()
                agree(contestant.name, wanted.setdefault(contestant.case, output), output, tolerance)
            except (Unavailable, ImportError) as error:
                _note(contestant, error, skipped)
                entries.remove(entry)
                entry.place.close()
        if not any(entry.contestant.role == "ours" for entry in entries):
            raise Unavailable(f"nothing of ours runs here: {'; '.join(x['reason'] for x in skipped)}")

    def _take_turns(self, entries: list[Entry], budget_s: float, once: bool) -> None:
        """Warms up, finds how many turns of how many calls each has time for, and lets them take these turns."""
        for entry in entries:
            entry.peak_mb, took = entry.place.one_call()
            if once:
                entry.seconds.append(took)
                continue
            took = max(min(entry.place.seconds(1) for _ in range(WARM_UP)), 1e-9)
            entry.n_calls = max(1, min(1000, round(TURN_S / took)))
            fit = budget_s / len(entries) / (entry.n_calls * took)
            entry.turns = max(LEAST_TURNS, min(MOST_TURNS, int(fit)))
        if once:
            self.benchmark.pedantic(lambda: None, rounds=1)
        else:
            self._alternate(entries)
        ours = next(entry for entry in entries if entry.contestant.role == "ours")
        self.benchmark.stats.stats.data[:] = ours.seconds  # the row of pytest-benchmark's own table

    def _alternate(self, entries: list[Entry]) -> None:
        n_turns = max(entry.turns for entry in entries)
        order, turn = list(entries), iter(range(n_turns))

        def everybody() -> None:
            now = next(turn)
            order.append(order.pop(0))  # nobody always follows the same
            for entry in order:
                if entry.takes_part(now, n_turns):
                    entry.seconds.append(entry.place.seconds(entry.n_calls))

        self.benchmark.pedantic(everybody, rounds=n_turns)


def _contestants(given, seen: Callable[[Any], Any]) -> list[Contestant]:
    """Builders by name, too, as Contestants; `seen` for those that do not say what of their answer is compared."""
    if isinstance(given, Mapping):
        given = [Contestant(name, make) for name, make in given.items()]
    return [replace(c, seen=seen) if c.seen is itself else c for c in given]


def _note(contestant: Contestant, error: Unavailable | ImportError, skipped: list[dict[str, str]]) -> None:
    """That a contestant cannot run here, and why; without the reference there is no contest."""
    if contestant.role == "reference":
        raise error
    skipped.append({"name": contestant.name, "reason": reason_of(error)})


def passes(backward: bool) -> What:
    return "forward+backward" if backward else "forward"


def differentiated(
    function: Callable[..., Any],
    leaves: Sequence[torch.Tensor],
    backward: bool,
    wanted: Sequence[int],
    cotangents: Sequence[torch.Tensor] = (),
) -> Call:
    """A call of a function of tensors: its outputs, and with `backward` the gradients of the wanted arguments.

    The cotangents are random numbers, the same for every function whose outputs have the same shapes, or those given.
    """
    if not backward:

        def forward() -> Any:
            with torch.no_grad():
                return function(*leaves)

        return forward
    leaves = list(leaves)
    for i in wanted:
        leaves[i] = leaves[i].detach().requires_grad_()
    inputs = [leaves[i] for i in wanted]
    d_outs = list(cotangents)

    def both() -> Any:
        out = function(*leaves)
        recorded = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]
        if not d_outs:
            draw = torch.Generator(recorded[0].device).manual_seed(0)
            numbers = (torch.randn(t.shape, generator=draw, device=t.device, dtype=t.dtype) for t in recorded)
            d_outs.extend(torch.empty_like(t).copy_(x) for t, x in zip(recorded, numbers))  # in the output's layout
        return out, torch.autograd.grad(recorded, inputs, d_outs)

    return both


def _row(entry: Entry, work: Work, limit: Mapping[str, float]) -> dict[str, Any]:
    median = statistics.median(entry.seconds)
    low, _, high = statistics.quantiles(entry.seconds * 2 if len(entry.seconds) == 1 else entry.seconds, n=4)
    moved = work.get("bytes", 0) + work.get("gathered_bytes", 0)
    least = least_seconds(work, limit)
    return {
        "name": entry.contestant.name,
        "role": entry.contestant.role,
        "median_s": median,
        "spread_s": high - low,
        "n": len(entry.seconds),
        "peak_mb": entry.peak_mb,
        "gflop_s": work["flop"] / median / 1e9 if work.get("flop") else None,
        "gb_s": moved / median / 1e9 if moved else None,
        "of_limit": least / median if least else None,
    }


def _scaling(x: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    points: dict[str, list[list[float]]] = {}
    for row in rows:
        name, _, value = row["name"].rpartition(", ")
        points.setdefault(name, []).append([float(value.removesuffix(x)), row["median_s"]])
    return {"x": x, "points": points}


def told(record: Mapping[str, Any]) -> list[str]:
    """What came out, in lines for a terminal."""
    lines = [f"{record['group']} {record['what']}"]
    for row in record["rows"]:
        words = f"  {row['name']:30} {_seconds(row['median_s'])} +- {_seconds(row['spread_s'])}"
        for key, unit in (("peak_mb", "MB"), ("gflop_s", "GFLOP/s"), ("gb_s", "GB/s")):
            words += "" if row[key] is None else f" {row[key]:8.1f} {unit}"
        lines.append(words + ("" if row["of_limit"] is None else f" {row['of_limit']:6.0%} of the limit"))
    lines += [f"  {x['name']:30} not here: {x['reason']}" for x in record["skipped"]]
    for goal in record["goals"]:
        lines.append(f"  goal, {goal['what']}: {goal['got']:.3g}{'' if goal['met'] else ', MISSED'}")
    return lines


def _seconds(value: float) -> str:
    unit, factor = next(((u, f) for u, f in (("s ", 1), ("ms", 1e3)) if value * f >= 1), ("us", 1e6))
    return f"{value * factor:7.{max(0, 2 - int(math.log10(max(1.0, value * factor))))}f} {unit}"
