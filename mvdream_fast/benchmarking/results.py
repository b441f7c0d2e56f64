"""A results file: what the benchmarks measured on one machine. pytest-benchmark's JSON comes in; this small schema of
our own stays readable whatever its next release writes, and holds no host name and no path.

How a contest is timed is the business of benchmarks/; how one is shown, of tables.py and page.py.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval, MinLen

from mvdream_fast.core.errors import InputFileError
from mvdream_fast.core.files import atomic_write, read_json
from mvdream_fast.core.schema import Checked, checked

SCHEMA = 1
Positive = Annotated[float, Interval(gt=0)]
AtLeast0 = Annotated[float, Interval(ge=0)]
Role = Literal["reference", "peer", "ours"]
ROLES: tuple[Role, ...] = ("reference", "peer", "ours")


@dataclass(frozen=True)
class Row(Checked):
    """One contestant: the median and the interquartile range of n turns, in seconds, and what the work makes of it.

    of_limit: the share of what the machine could do at best, from the same run; None where that isn't known.
    """

    name: str
    role: Role
    median_s: Positive
    spread_s: AtLeast0
    n: Annotated[int, Interval(ge=1)]
    peak_mb: AtLeast0 | None = None
    gflop_s: AtLeast0 | None = None
    gb_s: AtLeast0 | None = None
    of_limit: AtLeast0 | None = None


@dataclass(frozen=True)
class Skipped(Checked):
    """A contestant that this machine cannot run, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Goal(Checked):
    """What was to be reached and what was; a goal that was missed stays one."""

    what: str
    goal: float
    got: float
    unit: str
    met: bool


@dataclass(frozen=True)
class Scaling(Checked):
    """Seconds against an amount of work: contestant -> [[x, seconds], ...]."""

    x: str
    points: Annotated[dict[str, Annotated[tuple[tuple[Positive, Positive], ...], MinLen(1)]], MinLen(1)]


@dataclass(frozen=True)
class Limit(Checked):
    """What the machine can do at best, measured in the same run."""

    multiply_add_gflop_s: Positive
    copy_gb_s: Positive
    gather_gb_s: Positive


@dataclass(frozen=True)
class Contest(Checked):
    """Contestants that did the same work on the same numbers, taking turns in one run.

    file: of benchmarks/, which makes it.
    """

    group: str
    what: str
    file: str
    rows: Annotated[tuple[Row, ...], MinLen(1)]
    work: dict[str, float] = dataclasses.field(default_factory=dict[str, float])
    skipped: tuple[Skipped, ...] = ()
    goals: tuple[Goal, ...] = ()
    scaling: Scaling | None = None
    limit: Limit | None = None

    @property
    def name(self) -> str:
        """What the documents' marks call it, and pytest-benchmark its group."""
        return f"{self.group} {self.what}"

    def beside(self, row: Row, role: Role) -> Row | None:
        """The contestant of this role that did the same as `row`: the same case, which names end in
        ("ours, 2 threads"), else the only one there is, unless cost is measured against work."""
        others = [other for other in self.rows if other.role == role]
        alike = [other for other in others if _case(other) == _case(row)]
        alone = others if len(others) == 1 and self.scaling is None else []
        return next(iter(alike or alone), None)

    def lead(self, row: Row) -> float | None:
        """How many times as fast as `row` ours is; None for ours itself, and where ours is not timed beside it."""
        ours = None if row.role == "ours" else self.beside(row, "ours")
        return row.median_s / ours.median_s if ours else None


def _case(row: Row) -> str:
    return row.name.partition(",")[2]


@dataclass(frozen=True)
class Machine(Checked):
    """Where it was measured. threads: torch's."""

    cpu: str
    cores: int
    isa: str
    threads: int
    memory_gb: float | None = None
    gpu: str | None = None

    @property
    def slug(self) -> str:
        """A file's name: processor, cores and instruction set, and the GPU where there is one."""
        cpu = re.sub(r"\((r|tm|c)\)|@.*|\b(\d+-core|processor|cpu)\b", " ", self.cpu.lower())
        words = [*re.findall(r"[a-z0-9]+", cpu), str(self.cores), "cores", *re.findall(r"[a-z0-9]+", self.isa.lower())]
        return "-".join(words + re.findall(r"[a-z0-9]+", (self.gpu or "").lower()))


@dataclass(frozen=True)
class Results(Checked):
    """A whole file; contests are sorted by name, contestants by role and name.

    changed: the tree was not quite the commit's.
    """

    name: str
    machine: Machine
    versions: dict[str, str]
    commit: str
    changed: bool
    date: str
    command: str
    contests: tuple[Contest, ...]
    schema: Annotated[int, Interval(ge=SCHEMA, le=SCHEMA)] = SCHEMA

    def contest(self, name: str) -> Contest:
        """The contest of this name. Raises KeyError."""
        return {contest.name: contest for contest in self.contests}[name]


def load(path: Path) -> Results:
    """A results file. Raises InputFileError, with the key that does not fit."""
    return checked(Results, read_json(path), str(path), InputFileError)


def dumps(results: Results) -> str:
    """The file's text: a line for each contestant, without what it lacks, so that a new run's changes can be read."""
    text = json.dumps(_plain(dataclasses.asdict(results)), indent=1, ensure_ascii=False)
    for innermost in (r"[\[{][^\[\]{}]*[\]}]", r"\[\s*\[[^{}]*?\]\n\s*\]"):
        text = re.sub(innermost, lambda found: re.sub(r"\n\s*", " ", found.group()), text)
    return text + "\n"


def save(results: Results, path: Path) -> None:
    """Writes the file whole or not at all. Raises OutputError."""
    atomic_write(path, dumps(results))


def _plain(value: Any) -> Any:
    """Without what is empty; floats with four digits, a benchmark has no more. Amounts of work are whole numbers."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item not in (None, (), {})}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) and not value.is_integer() else value


def from_pytest(data: Mapping[str, Any], command: str, name: str | None = None) -> Results:
    """What `pytest --benchmark-json` wrote, as results; benchmarks that record no contest are left out.

    Args:
        command: what was typed.
        name: of the machine, where its slug is not to be it.
    Raises: InputFileError where nothing is in it, or a contest does not fit the schema.
    """
    found = data["machine_info"]["mvdream_fast"]
    machine = Machine(
        cpu=found["cpu"],
        cores=found["cores"],
        isa=found["capability"],
        threads=found["torch_threads"],
        memory_gb=found["memory_gb"],
        gpu=found["gpu"],
    )
    contests = [
        {**benchmark["extra_info"]["contest"], "file": benchmark["fullname"].partition("::")[0].rpartition("/")[2]}
        for benchmark in data["benchmarks"]
        if "contest" in benchmark["extra_info"]
    ]
    if not contests:
        raise InputFileError("no benchmark recorded a contest: name others by -k, or see what pytest said")
    plain = {
        "name": name or machine.slug,
        "machine": dataclasses.asdict(machine),
        "versions": {"python": data["machine_info"]["python_version"], **_versions(found)},
        "commit": (data["commit_info"].get("id") or "unknown")[:10],
        "changed": bool(data["commit_info"].get("dirty")),
        "date": data["datetime"][:10],
        "command": command,
        "contests": contests,
    }
    return _sorted(checked(Results, plain, "the benchmarks' figures", InputFileError))


def _versions(found: Mapping[str, Any]) -> dict[str, str]:
    return {"torch": found["torch"], **found.get("versions", {})}


def _sorted(results: Results) -> Results:
    def rows(contest: Contest) -> tuple[Row, ...]:
        return tuple(sorted(contest.rows, key=lambda row: (ROLES.index(row.role), row.name)))

    contests: dict[str, Contest] = {}
    for contest in sorted(results.contests, key=lambda contest: contest.name):
        times, group = 1, contest.group
        while contest.name in contests:  # two benches may call the same work the same
            contest = dataclasses.replace(contest, group=f"{group} ({(times := times + 1)})")
        contests[contest.name] = dataclasses.replace(contest, rows=rows(contest))
    return dataclasses.replace(results, contests=tuple(contests[name] for name in sorted(contests)))
