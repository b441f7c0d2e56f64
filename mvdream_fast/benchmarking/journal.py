"""The journal of a run of the benchmarks: a line of JSON for all that happens, so that a benchmark which ends its
process (a fault in native code, no memory left) costs itself and nothing else.

pytest loads this file as a plugin (`-p mvdream_fast.benchmarking.journal --journal FILE`), which writes; `measure`
starts such processes until no case is left. A second process takes up the cases that were not begun yet.
"""

import json
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mvdream_fast.core.files import read_text

PLUGIN = "benchmark journal"
INTERRUPTED = 2  # pytest's exit code where somebody pressed Ctrl-C, or a file cannot be collected


@dataclass
class Journal:
    """What a file holds. begun: cases in their order. failed: case -> why. contests: case -> what it recorded."""

    head: Mapping[str, Any] = field(default_factory=dict[str, Any])
    begun: list[str] = field(default_factory=list[str])
    ended: set[str] = field(default_factory=set[str])
    failed: dict[str, str] = field(default_factory=dict[str, str])
    contests: dict[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])

    @property
    def cases(self) -> Sequence[str]:
        """All that were to be run."""
        return self.head.get("cases", ())

    @property
    def left(self) -> list[str]:
        """The cases that no process has begun."""
        begun = set(self.begun)
        return [case for case in self.cases if case not in begun]

    def benchmarks(self) -> dict[str, Any]:
        """The contests as `pytest --benchmark-json` would have written them, for `results.from_pytest`."""
        found = [{"fullname": case, "extra_info": {"contest": record}} for case, record in self.contests.items()]
        return {**self.head, "benchmarks": found}


def read(path: Path) -> Journal:
    """The journal in a file; empty where there is none. A line that its process did not end is left out."""
    journal = Journal()
    whole = read_text(path).rpartition("\n")[0] if path.exists() else ""
    for row in (json.loads(line) for line in whole.split("\n") if line):
        case = row.get("case", "")
        match row["what"]:
            case "head":
                journal.head = row
            case "begin":
                journal.begun.append(case)
            case "end":
                journal.ended.add(case)
            case "fail":
                journal.failed[case] = row["why"]
            case "contest":
                journal.contests[case] = row["record"]
            case _:
                raise ValueError(f"{path}: nothing is called {row['what']!r} in a journal")
    return journal


def write(path: Path, what: str, **rest: Any) -> None:
    """Adds a line, at once: whoever writes it may not live to see the next."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"what": what, **rest}) + "\n")


def measure(command: Sequence[str], root: Path, path: Path) -> tuple[Journal, int]:
    """Runs pytest in `root` until every case was begun: again, for those that are left, where its process died.

    command: pytest's, without the journal. Returns the journal, in which the cases that cost a process have failed, and
    the exit code of the last process.
    """
    journal = read(path)
    while True:
        n_begun = len(journal.begun)
        line = [*command, "-p", __name__, "--journal", str(path)]
        code = subprocess.run(line, cwd=root, check=False).returncode
        journal = read(path)
        for case in set(journal.begun[n_begun:]) - journal.ended:  # one at most
            write(path, "fail", case=case, why=f"ended its process ({reason(code)})")
        journal = read(path)
        if not journal.left or code == INTERRUPTED:
            return journal, code
        if len(journal.begun) == n_begun:  # it does not even get so far: the next would not, either
            journal.failed |= dict.fromkeys(journal.left, f"was not begun: pytest ended before it ({reason(code)})")
            return journal, code
        last, n_left = journal.begun[-1], len(journal.left)
        print(f"\nin {last} pytest's process ended ({reason(code)}); {n_left} cases are left", flush=True)


def reason(code: int) -> str:
    """Why a process ended that was to go on: `SIGSEGV`, or `exit code 1`."""
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        return f"signal {-code}"


class Writer:
    """The plugin of pytest. It leaves out what another process has begun; n_before: how many these are."""

    def __init__(self, path: Path, config: Any):
        self.path, self.config, self.before = path, config, read(path)
        self.failed: set[str] = set()

    @property
    def n_before(self) -> int:
        return len(self.before.begun)

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        begun = set(self.before.begun)
        gone = [item for item in items if item.nodeid in begun]
        if gone:
            items[:] = [item for item in items if item.nodeid not in begun]
            config.hook.pytest_deselected(items=gone)

    def pytest_collection_finish(self, session: Any) -> None:
        if self.before.head or session.testsfailed:
            return
        hook = self.config.hook
        machine = hook.pytest_benchmark_generate_machine_info(config=self.config)
        hook.pytest_benchmark_update_machine_info(config=self.config, machine_info=machine)
        commit = hook.pytest_benchmark_generate_commit_info(config=self.config)
        cases, now = [item.nodeid for item in session.items], datetime.now(UTC).isoformat()
        write(self.path, "head", cases=cases, machine_info=machine, commit_info=commit, datetime=now)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        write(self.path, "begin", case=nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.add(report.nodeid)
            write(self.path, "fail", case=report.nodeid, why=f"failed in its {report.when}, as pytest says above")

    def pytest_runtest_teardown(self, item: Any) -> None:
        """The call is over; what follows may still end the process."""
        if item.nodeid in self.failed:
            return
        benchmark = item.funcargs.get("benchmark")
        contest = benchmark.extra_info.get("contest") if benchmark else None
        if contest is not None:
            write(self.path, "contest", case=item.nodeid, record=contest)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        write(self.path, "end", case=nodeid)


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--journal", type=Path, required=True, help="the file that says what happened so far")


def pytest_configure(config: Any) -> None:
    config.pluginmanager.register(Writer(config.getoption("journal"), config), PLUGIN)
