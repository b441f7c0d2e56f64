"""`python -m mvdream_fast.benchmark run | page | tables | compare`: what this machine's benchmarks say, as a file and a
page."""

import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro import conf

import mvdream_fast
from mvdream_fast.core import cli
from mvdream_fast.core.errors import ArgumentError, InputFileError, OutputError

if TYPE_CHECKING:
    from mvdream_fast.benchmarking.results import Results

DOCUMENTS = ("README.md", "docs/*.md")
FAILED = 1  # the exit code of pytest, and ours, where a benchmark failed or something is slower than it may be


@dataclass(frozen=True)
class Run:
    """Runs the benchmarks, and writes benchmarks/results/<machine>.json, its page beside it, and the documents' tables.

    It takes a quarter of an hour on two idle cores; anything else at work on the machine shows in the figures.
    """

    only: Annotated[str | None, conf.arg(aliases=["-k"], metavar="EXPRESSION")] = None
    """Only the benchmarks that pytest -k would take; needs -o, so that a part does not replace the whole."""
    output: Annotated[Path | None, conf.arg(aliases=["-o"])] = None
    """The results file (.json), instead of this machine's. No document is written then."""
    name: str | None = None
    """What the machine is called, instead of by processor, cores and instruction set."""
    slow: bool = False
    """The long ones, too, such as the UNet of the released size."""


@dataclass(frozen=True)
class Page:
    """Writes the page of results files, each beside its file: FILE.html."""

    files: conf.Positional[tuple[Path, ...]]
    """Results files."""


@dataclass(frozen=True)
class Tables:
    """Writes the tables of README and docs anew, from the results files that their marks name."""

    check: bool = False
    """Writes nothing; leaves with 1 where a document is out of date."""


@dataclass(frozen=True)
class Compare:
    """Says what got slower and faster from A to B. Ratios to each run's own reference, or to its machine's limit, are
    compared rather than seconds; leaves with 1 where something is slower past the bound and past its spread."""

    a: conf.Positional[Path]
    """The older results file."""
    b: conf.Positional[Path]
    """The newer one."""
    bound: float = 1.3
    """How many times the time it may take."""


Action = Annotated[
    Annotated[Run, conf.subcommand("run")]
    | Annotated[Page, conf.subcommand("page")]
    | Annotated[Tables, conf.subcommand("tables")]
    | Annotated[Compare, conf.subcommand("compare")],
    conf.arg(name=""),
]


@dataclass(frozen=True)
class Flags:
    """Measures this machine, and shows and compares what was measured. `run` and `tables` need a checkout of the
    repository; `make bench` is `run`."""

    action: Action


def main(flags: Flags) -> None:
    """Does what is asked. Raises: the errors of the exit codes in `--help`."""
    action = flags.action
    if isinstance(action, Run):
        run(action)
    elif isinstance(action, Page):
        write_pages(action.files)
    elif isinstance(action, Tables):
        sys.exit(write_tables(checkout(), action.check))
    else:
        sys.exit(compare(action))


def checkout() -> Path:
    """The repository around this package. Raises ArgumentError where it is installed without one."""
    root = Path(mvdream_fast.__file__).resolve().parents[1]
    if not (root / "benchmarks" / "conftest.py").is_file():
        raise ArgumentError(
            f"the benchmarks are not part of the installed package in {root}; clone the repository and run this there"
        )
    return root


def run(flags: Run) -> None:
    """The benchmarks in processes of their own, then the files. Raises ArgumentError, InputFileError, OutputError."""
    from mvdream_fast.benchmarking import results
    from mvdream_fast.benchmarking.journal import INTERRUPTED, measure

    if flags.only is not None and flags.output is None:
        raise ArgumentError("-o must name a file for a part of the benchmarks; without -k, this machine's is written")
    if flags.name is not None and not re.fullmatch(r"[\w.-]*\w", flags.name):
        raise ArgumentError(f"--name must be a file's name without a folder, of letters and digits, got {flags.name!r}")
    root = checkout()
    folder = check_output(flags.output, root / "benchmarks" / "results")
    with tempfile.TemporaryDirectory() as place:
        journal, code = measure(_pytest(flags), root, Path(place) / "journal.jsonl")
    if code == INTERRUPTED or not journal.begun:
        raise InputFileError(f"the benchmarks left no figures: pytest ended with {code}, its lines are above")
    found = results.from_pytest(journal.benchmarks(), command(flags), flags.name)
    path = flags.output or folder / f"{found.name}.json"
    save(found, path)
    print(f"wrote {path}")
    write_pages((path,))
    if flags.output is None:
        write_tables(root, check=False)
    if journal.failed:
        told = "".join(f"\n  {case} {why}" for case, why in journal.failed.items())
        count = f"{len(journal.failed)} of {len(journal.cases)} benchmarks failed"
        cli.fail("benchmark", f"{count}; the others' figures are written:{told}", FAILED)


def check_output(output: Path | None, folder: Path) -> Path:
    """The folder that the figures go to, made where it is missing: of `output`, else `folder`. It is asked for before
    a quarter of an hour is measured. Raises ArgumentError, OutputError."""
    from mvdream_fast.core.files import make_folder

    if output is not None and output.suffix != ".json":
        raise ArgumentError(f"-o must be a file that ends in .json, got {output}; its page is put beside it as .html")
    for path in [] if output is None else [output, output.with_suffix(".html")]:
        if path.exists() and not path.is_file():
            raise OutputError(f"cannot write {path}: it is not a regular file; name another by -o")
    folder = make_folder(folder if output is None else output.parent)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OutputError(f"the folder {folder} must be one that can be written; name another place by -o") from error
    return folder


def save(found: "Results", path: Path) -> None:
    """Writes the results file; to a temporary folder where that fails, which the error names. Raises OutputError."""
    from mvdream_fast.benchmarking import results

    try:
        results.save(found, path)
    except OutputError as error:
        kept = Path(tempfile.mkdtemp(prefix="benchmark-")) / path.name
        results.save(found, kept)
        raise OutputError(f"{error}; what was measured is in {kept}") from error


def command(flags: Run) -> str:
    """What was typed, as the results file has it: `make bench` where it would do the same."""
    words = ["--slow"] * flags.slow + [f"-k '{flags.only}'"] * (flags.only is not None)
    return " ".join(["python -m mvdream_fast.benchmark run", *words]) if words else "make bench"


def _pytest(flags: Run) -> list[str]:
    marks = "slow or not slow" if flags.slow else "not slow"
    words = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-m", marks]
    return words + (["-k", flags.only] if flags.only is not None else [])


def write_pages(files: tuple[Path, ...]) -> None:
    """FILE.html beside each results file. Raises ArgumentError, InputFileError, OutputError."""
    from mvdream_fast.benchmarking.page import page
    from mvdream_fast.benchmarking.results import load
    from mvdream_fast.core.files import atomic_write

    if not files:
        raise ArgumentError("name at least one results file, such as those in benchmarks/results/")
    for file in files:
        out = file.with_suffix(".html")
        atomic_write(out, page(load(file)))
        print(f"wrote {out}")


def write_tables(root: Path, check: bool) -> int:
    """The marked blocks of every document anew; with `check` only the exit code. Raises InputFileError, OutputError."""
    from mvdream_fast.benchmarking.tables import fill
    from mvdream_fast.core.files import atomic_write, read_text

    stale = 0
    for page in (page for pattern in DOCUMENTS for page in sorted(root.glob(pattern))):
        text, name = read_text(page), str(page.relative_to(root))
        new = fill(text, root / "benchmarks" / "results", name)
        if new == text:
            continue
        stale += 1
        print(f"{name} is out of date" if check else f"wrote {name}")
        if not check:
            atomic_write(page, new)
    return FAILED if check and stale else 0


def compare(flags: Compare) -> int:
    """Prints the difference; 1 where something is slower past the bound. Raises ArgumentError, InputFileError."""
    from mvdream_fast.benchmarking.changes import conditions, difference, report
    from mvdream_fast.benchmarking.results import load

    cli.check_at_least(flags, 1, "bound")
    a, b = load(flags.a), load(flags.b)
    for name, (was, now) in conditions(a, b).items():
        print(f"{name}: {was} -> {now}")
    found = difference(a, b)
    if not found.changes and not found.apart:
        raise InputFileError(f"{flags.a} and {flags.b} have no contest in common")
    print(report(found, flags.bound))
    return FAILED if found.slower(flags.bound) else 0


if __name__ == "__main__":
    cli.run(main, Flags, prog="benchmark")
