"""Markdown of contests, and the blocks of a document that hold it:

    <!-- results: FILE CONTEST -->
    ...
    <!-- end -->

FILE lies in benchmarks/results/. CONTEST is a contest's name, or a pattern of several (`geglu*`); `machine` is what
they were measured on, `goals` every goal of the file, `missed` those that were missed.
"""

import fnmatch
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from mvdream_fast.benchmarking.figures import amount, memory, number, ratio, reached, seconds, share
from mvdream_fast.benchmarking.results import ROLES, Contest, Goal, Results, Row, load
from mvdream_fast.core.errors import InputFileError

OPENING = r"<!-- results: (\S+\.json) (.+?) -->\n"
BLOCK = re.compile(rf"({OPENING})(.*?)(<!-- end -->)", re.DOTALL)
WIDTH = 118

Columns = tuple[tuple[str, Callable[[Contest, Row], str | None]], ...]
# What a table of contestants shows: head, and a row's cell, None where it has none; a column without any is left out.
COLUMNS: Columns = (
    ("time", lambda contest, row: seconds(row.median_s)),
    ("spread", lambda contest, row: share(row.spread_s / row.median_s)),
    ("ours against it", lambda contest, row: _maybe(ratio, contest.lead(row))),
    ("peak memory", lambda contest, row: _maybe(memory, row.peak_mb)),
    ("GFLOP/s", lambda contest, row: _maybe(number, row.gflop_s)),
    ("GB/s", lambda contest, row: _maybe(number, row.gb_s)),
    ("of the machine's limit", lambda contest, row: _maybe(share, row.of_limit)),
)
OURS: Columns = (
    ("peak memory of ours", lambda contest, row: _maybe(memory, row.peak_mb)),
    ("its share of the machine's limit", lambda contest, row: _maybe(share, row.of_limit)),
)
MISSED = "missed"
GOALS = ("goal", "came to", "wanted", "contest")


def fill(text: str, folder: Path, page: str) -> str:
    """A document with every block written anew from the results files of `folder`.

    Raises: InputFileError for a block that does not end, a file that is missing and a contest that it does not hold.
    """
    if len(re.findall(OPENING, text)) != len(BLOCK.findall(text)):
        raise InputFileError(f"{page}: a block that begins with `<!-- results: FILE CONTEST -->` has no `<!-- end -->`")
    return BLOCK.sub(lambda found: found[1] + block(load(folder / found[2]), found[3], page) + found[5], text)


def block(results: Results, pattern: str, page: str) -> str:
    """What stands between the marks. Raises InputFileError where no contest is called so."""
    if pattern == "machine":
        return machine(results)
    if pattern == "goals":
        return goals(results.contests)
    if pattern == MISSED:
        return missed(results.contests)
    contests = [contest for contest in results.contests if fnmatch.fnmatchcase(contest.name, pattern)]
    if not contests:
        known = "; ".join(contest.name for contest in results.contests)
        raise InputFileError(f"{page}: no contest of {results.name} is called {pattern!r}; there are: {known}")
    return contests_block(results, contests)


def machine(results: Results) -> str:
    """The machine, its limits and the versions, as a paragraph."""
    return _paragraph(f"{about(results)} {limits(results)}".strip())


def about(results: Results) -> str:
    """Where, when, of what and by what it was measured, in one or two sentences."""
    at, of = results.machine, results.commit + (" with changes" if results.changed else "")
    where = f"{at.cpu}, {at.cores} cores, {at.isa}, {at.threads} threads" + (f", {at.gpu}" if at.gpu else "")
    memory_gb = f", {at.memory_gb:g} GB of memory" if at.memory_gb else ""
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    return f"{where}{memory_gb}; {versions}. `{results.command}`, {results.date}, commit {of}."


def limits(results: Results) -> str:
    """What the machine can do at best, as the contests' runs measured it; empty where none did."""
    found = [contest.limit for contest in results.contests if contest.limit]
    if not found:
        return ""
    names = {
        "multiply_add_gflop_s": "multiply-adds {} GFLOP/s",
        "copy_gb_s": "copying {} GB/s",
        "gather_gb_s": "gathering from a hash table {} GB/s",
    }
    parts = [form.format(_range([getattr(limit, name) for limit in found])) for name, form in names.items()]
    return f"The machine's limit in that run: {', '.join(parts)}."


def contests_block(results: Results, contests: Sequence[Contest]) -> str:
    """Contests as one table of contestants, with their scaling, their goals, who is left out, and the command."""
    alike = [contest for contest in contests if not contest.scaling]
    parts = [contestants(alike[0]) if len(alike) == 1 else overview(alike)] if alike else []
    parts += [scaling(contest) for contest in contests if contest.scaling]
    parts += [goals(contests)] if any(contest.goals for contest in contests) else []
    parts += [_paragraph(line) for line in [left_out(contests)] if line]
    made = _paragraph(f"`{command(results, contests)}`, {results.date}, commit {results.commit}.")
    return "\n".join([*parts, made])


def command(results: Results, contests: Sequence[Contest]) -> str:
    """What makes these contests' figures again."""
    files = dict.fromkeys(f"benchmarks/{contest.file}" for contest in contests)
    marks = ' -m "slow or not slow"' if "--slow" in results.command else ""
    return f"pytest {' '.join(files)} --benchmark-only{marks}"


def contestants(contest: Contest) -> str:
    """A row for each contestant."""
    return table(*contestant_cells(contest))


def contestant_cells(contest: Contest) -> tuple[list[str], list[list[str]]]:
    """The heads of the columns that have something, and the rows."""
    columns = [(head, [cell(contest, row) for row in contest.rows]) for head, cell in COLUMNS]
    columns = [(head, cells) for head, cells in columns if any(cells)]
    rows = [[row.name, *(cells[i] or "" for _, cells in columns)] for i, row in enumerate(contest.rows)]
    return ["contestant", *(head for head, _ in columns)], rows


def overview(contests: Sequence[Contest]) -> str:
    """A row for each contest: everybody's time and how many times as fast ours is, then what ours holds and reaches."""
    roles = {row.name: ROLES.index(row.role) for contest in contests for row in contest.rows}
    names = sorted(roles, key=lambda name: roles[name])
    rows = []
    for contest in contests:
        by_name = {row.name: row for row in contest.rows}
        ours = [row for row in contest.rows if row.role == "ours"]
        times = [_time(contest, by_name[name]) if name in by_name else "" for name in names]
        of_ours = [", ".join(filter(None, (cell(contest, row) for row in ours))) for _, cell in OURS]
        rows.append([contest.name, *times, *of_ours])
    return table(["contest", *names, *(head for head, _ in OURS)], rows)


def scaling(contest: Contest) -> str:
    """Cost against work, a column for each contestant."""
    return f"{contest.name}:\n\n{table(*scaling_cells(contest))}"


def scaling_cells(contest: Contest) -> tuple[list[str], list[list[str]]]:
    """The heads and the rows of a contest's scaling; a cell is empty where a contestant was not timed."""
    assert contest.scaling
    taken = {name: dict(points) for name, points in contest.scaling.points.items()}
    steps = sorted({x for points in taken.values() for x in points})
    rows = [[amount(x), *(_maybe(seconds, points.get(x)) or "" for points in taken.values())] for x in steps]
    return [contest.scaling.x, *taken], rows


def goals(contests: Sequence[Contest]) -> str:
    """Every goal, those that were missed first and in bold."""
    rows = [[f"**{word}**" if word == MISSED else word, *cells] for word, *cells in goal_cells(contests)]
    return table(GOALS, rows)


def missed(contests: Sequence[Contest]) -> str:
    """The goals that were missed, and how many were not."""
    found = [cells for word, *cells in goal_cells(contests) if word == MISSED]
    n_met = sum(len(contest.goals) for contest in contests) - len(found)
    return (table(GOALS[1:], found) if found else "None.\n") + f"\nGoals that were met: {n_met}.\n"


def goal_cells(contests: Sequence[Contest]) -> list[list[str]]:
    """The word "met" or "missed", what came of the goal, the goal, the contest; missed ones first."""
    found: list[tuple[Contest, Goal]] = [(contest, goal) for contest in contests for goal in contest.goals]
    return [
        ["met" if goal.met else MISSED, reached(goal), goal.what, contest.name]
        for contest, goal in sorted(found, key=lambda pair: pair[1].met)
    ]


def left_out(contests: Sequence[Contest]) -> str:
    """Who did not run, with the reasons, as a sentence; empty where all did."""
    reasons = dict.fromkeys(f"{one.name} ({one.reason})" for contest in contests for one in contest.skipped)
    return f"Not run here: {'; '.join(reasons)}." if reasons else ""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def without_blocks(text: str) -> str:
    """A document without what the blocks hold."""
    return BLOCK.sub(lambda found: "\n" * found[0].count("\n"), text)


def _time(contest: Contest, row: Row) -> str:
    lead = contest.lead(row)
    return seconds(row.median_s) if lead is None else f"{seconds(row.median_s)}, {ratio(lead)}"


def _maybe(form: Callable[[float], str], value: float | None) -> str | None:
    return None if value is None else form(value)


def _range(values: Sequence[float]) -> str:
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def _paragraph(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False) + "\n"
