"""The benchmark command end to end: a checkout with one benchmark is run, its page and tables are written, results are
compared, and what is missing is said in a sentence."""

import dataclasses
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from sample_results import GEGLU, RESULTS

from mvdream_fast import benchmark
from mvdream_fast.benchmarking import journal, results
from mvdream_fast.core import cli

ROOT = Path(__file__).parents[1]
MACHINE = {
    "cpu": "Acme", "cores": 2, "capability": "AVX2", "torch_threads": 2, "memory_gb": 8.0, "gpu": None,
    "torch": "2.13.0",
}  # fmt: skip
CONFTEST = (
    f"def pytest_benchmark_update_machine_info(config, machine_info):\n    machine_info['mvdream_fast'] = {MACHINE}\n"
)
COUNTING = f"""
import importlib.util, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
from mvdream_fast.benchmarking.journal import PLUGIN
from progress import Progress
def pytest_collection_finish(session):
    n_before = session.config.pluginmanager.get_plugin(PLUGIN).n_before
    say = lambda line: print(line, file=sys.__stdout__, flush=True)
    session.config.pluginmanager.register(Progress(say, n_before + len(session.items), n_before))
"""
CONTEST = {
    "group": "nothing", "what": "forward", "work": {}, "skipped": [], "goals": [], "scaling": None, "limit": None,
    "rows": [{"name": "ours", "role": "ours", "median_s": 0.5, "spread_s": 0.1, "n": 3}],
}  # fmt: skip
BENCH = f"""
import pytest
def bench_nothing(benchmark):
    benchmark.pedantic(lambda: None)
    benchmark.extra_info["contest"] = {CONTEST}
@pytest.mark.slow
def bench_long(benchmark):
    benchmark.pedantic(lambda: None)
    benchmark.extra_info["contest"] = {CONTEST | {"group": "long"}}
"""
SETTINGS = "[pytest]\npython_files = bench_*.py\npython_functions = bench_*\nmarkers = slow\n"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one bench of two cases and a document that shows what comes out."""
    for path, text in {
        "benchmarks/conftest.py": CONFTEST,
        "benchmarks/bench_nothing.py": BENCH,
        "pytest.ini": SETTINGS,
        "docs/page.md": "# A page\n\n<!-- results: acme-2-cores-avx2.json nothing* -->\n<!-- end -->\n",
        "README.md": "No block.\n",
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setattr(benchmark, "checkout", lambda: tmp_path)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # a run of its own, beside nobody
    return tmp_path


def command(*argv: object) -> int:
    """The exit code of the command, run in this process."""
    try:
        cli.run(benchmark.main, benchmark.Flags, prog="benchmark", argv=[str(word) for word in argv])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_run_writes_the_file_the_page_and_the_tables(checkout, capsys):
    assert command("run") == 0
    path = checkout / "benchmarks/results/acme-2-cores-avx2.json"
    found = results.load(path)
    assert [contest.name for contest in found.contests] == ["nothing forward"]  # without the slow one
    assert found.contests[0].file == "bench_nothing.py"
    assert found.command == "make bench"
    assert "<h2 id=" in path.with_suffix(".html").read_text()
    assert "| ours | 500 ms | 20 % |" in (checkout / "docs/page.md").read_text()
    assert "wrote docs/page.md" in capsys.readouterr().out
    assert command("tables", "--check") == 0


def test_a_part_goes_to_a_file_of_its_own(checkout, tmp_path):
    out = tmp_path / "part.json"
    assert command("run", "-k", "long", "--slow", "-o", out) == 0
    found = results.load(out)
    assert [contest.name for contest in found.contests] == ["long forward"]
    assert found.command == "python -m mvdream_fast.benchmark run --slow -k 'long'"
    assert not (checkout / "benchmarks/results").exists()
    assert "500 ms" not in (checkout / "docs/page.md").read_text()


def test_a_part_does_not_replace_the_whole(checkout, capsys):
    assert command("run", "-k", "nothing") == 2
    assert "-o must name a file for a part of the benchmarks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "code", "message"),
    [
        ("figures.html", 2, "-o must be a file that ends in .json, got figures.html"),
        ("figures", 2, "-o must be a file that ends in .json, got figures"),
        ("folder.json", 7, "cannot write folder.json: it is not a regular file"),
        ("page.json", 7, "cannot write page.html: it is not a regular file"),
        ("README.md/figures.json", 7, "the folder README.md cannot be made: a file is in the way"),
        ("/proc/nothing/figures.json", 7, "the folder /proc/nothing cannot be made"),
        ("/proc/figures.json", 7, "the folder /proc must be one that can be written"),
    ],
)
def test_an_output_that_cannot_be_is_said_before_anything_is_measured(
    output, code, message, checkout, monkeypatch, capsys
):
    monkeypatch.chdir(checkout)
    for folder in ("folder.json", "page.html"):
        (checkout / folder).mkdir()
    monkeypatch.setattr(journal, "measure", lambda *_: pytest.fail("it was measured"))
    assert command("run", "-o", output) == code
    assert message in capsys.readouterr().err


def test_figures_that_cannot_be_written_are_kept(checkout, tmp_path, monkeypatch, capfd):
    """The output's folder is gone when everything was measured."""
    (tmp_path / "kept").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "kept"))
    bench, out = checkout / "benchmarks/bench_nothing.py", tmp_path / "out" / "figures.json"
    bench.write_text(BENCH + f"def bench_last(benchmark):\n    import os\n    os.rmdir({str(out.parent)!r})\n")
    assert command("run", "-o", out) == 7
    (kept,) = (tmp_path / "kept").rglob("figures.json")
    assert f"cannot write {out} (" in (said := capfd.readouterr().err)
    assert f"; what was measured is in {kept}" in said
    assert results.load(kept).contests[0].name == "nothing forward"


def test_a_benchmark_that_ends_its_process_costs_one_case(checkout, capfd):
    """The case before it is kept, those after it run in a new process, and the count goes on over both."""
    bench = checkout / "benchmarks/bench_nothing.py"
    dying = "import os, signal\ndef bench_dying(benchmark):\n    os.kill(os.getpid(), signal.SIGSEGV)\n"
    after = BENCH.replace("nothing", "after").partition("@")[0]
    bench.write_text(BENCH + dying + after)
    (checkout / "benchmarks/conftest.py").write_text(CONFTEST + COUNTING)
    assert command("run") == 1
    found = results.load(checkout / "benchmarks/results/acme-2-cores-avx2.json")
    assert [contest.name for contest in found.contests] == ["after forward", "nothing forward"]
    out, said = capfd.readouterr()
    assert "1 of 3 benchmarks failed" in said
    assert "bench_nothing.py::bench_dying ended its process (SIGSEGV)" in said
    assert re.findall(r"\[\d of 3\] .*", out) == [
        "[1 of 3] bench_nothing.py::bench_nothing",
        "[2 of 3] bench_nothing.py::bench_dying, about 0 s to go",
        "[3 of 3] bench_nothing.py::bench_after",
    ]


def test_a_benchmark_that_dies_when_it_was_measured(checkout, capsys):
    """What ends the process is its fixture's end: the figures stay, and it has failed all the same."""
    bench = checkout / "benchmarks/bench_nothing.py"
    fixture = "import os\n@pytest.fixture\ndef dying():\n    yield\n    os._exit(0)\n"
    bench.write_text(BENCH.replace("(benchmark)", "(benchmark, dying)") + fixture)
    assert command("run", "--slow") == 1
    found = results.load(checkout / "benchmarks/results/acme-2-cores-avx2.json")
    assert [contest.name for contest in found.contests] == ["long forward", "nothing forward"]
    assert capsys.readouterr().err.count("ended its process (exit code 0)") == 2


def test_a_run_that_cannot_go_on_keeps_what_there_is(checkout, capsys):
    """The second process dies before it begins: what is left was not begun, and nothing runs for ever."""
    bench = checkout / "benchmarks/bench_nothing.py"
    once = "import os, pathlib\nmark = pathlib.Path(__file__).with_suffix('.mark')\nif mark.exists(): os._exit(9)\n"
    dying = "def bench_dying(benchmark):\n    mark.touch()\n    os._exit(1)\n"
    bench.write_text(once + BENCH + dying + "def bench_left(benchmark): ...\n")
    assert command("run") == 1
    said = capsys.readouterr().err
    assert "2 of 3 benchmarks failed" in said
    assert "bench_dying ended its process (exit code 1)" in said
    assert "bench_left was not begun: pytest ended before it (exit code 9)" in said
    assert results.load(checkout / "benchmarks/results/acme-2-cores-avx2.json").contests


def test_a_benchmark_that_fails(checkout, capsys):
    bench = checkout / "benchmarks/bench_nothing.py"
    bench.write_text(BENCH + "def bench_broken(benchmark):\n    raise ValueError\n")
    assert command("run") == 1
    said = capsys.readouterr().err
    assert "1 of 2 benchmarks failed; the others' figures are written" in said
    assert "bench_broken failed in its call, as pytest says above" in said
    assert results.load(checkout / "benchmarks/results/acme-2-cores-avx2.json").contests
    bench.write_text("import nowhere\n")
    assert command("run") == 5
    assert "left no figures: pytest ended with" in capsys.readouterr().err


def test_tables_that_are_out_of_date_are_named(checkout, capsys):
    folder = checkout / "benchmarks/results"
    folder.mkdir()
    results.save(RESULTS, folder / "acme-2-cores-avx2.json")
    page = checkout / "docs/page.md"
    page.write_text(page.read_text().replace("nothing*", "march*"))
    before = page.read_text()
    assert command("tables", "--check") == 1
    assert "docs/page.md is out of date" in capsys.readouterr().out
    assert page.read_text() == before
    assert command("tables") == 0
    assert "500 ms" in page.read_text()
    assert command("tables", "--check") == 0


def test_compare_leaves_with_1_past_the_bound(tmp_path, capsys):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    slow = dataclasses.replace(GEGLU.rows[2], median_s=4e-3)
    changed = dataclasses.replace(GEGLU, rows=(*GEGLU.rows[:2], slow))
    results.save(RESULTS, a)
    results.save(dataclasses.replace(RESULTS, contests=(changed,), versions={"torch": "2.14.0"}), b)
    assert command("compare", a, b) == 1
    said = capsys.readouterr().out
    assert "torch: 2.13.0 -> 2.14.0" in said
    assert "geglu (2048, 1024) forward: 2.00 times the time against the reference" in said
    assert command("compare", a, b, "--bound", 3) == 0
    assert command("compare", b, a) == 0
    assert command("compare", a, a) == 0


def test_files_of_other_contests_are_not_alike(tmp_path, capsys):
    for name, contest in (("a.json", RESULTS.contests[0]), ("b.json", GEGLU)):
        results.save(dataclasses.replace(RESULTS, contests=(contest,)), tmp_path / name)
    assert command("compare", tmp_path / "a.json", tmp_path / "b.json") == 5
    assert "have no contest in common" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["compare", "a.json", "b.json", "--bound", "0.5"], 2, "--bound must be at least 1"),
        (["compare", "gone.json", "gone.json"], 5, "cannot read gone.json"),
        (["page", "gone.json"], 5, "cannot read gone.json"),
        (["run", "--name", "../mine"], 2, "--name must be a file's name without a folder"),
        (["page"], 2, "name at least one results file"),
    ],
)
def test_mistakes_are_a_sentence(in_tmp, capsys, argv, code, says):
    assert command(*argv) == code
    assert says in capsys.readouterr().err


def test_an_installed_package_says_that_it_has_no_benchmarks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark.mvdream_fast, "__file__", str(tmp_path / "site-packages/mvdream_fast/__init__.py"))
    for verb in ("run", "tables"):
        assert command(verb) == 2
        assert "the benchmarks are not part of the installed package" in capsys.readouterr().err


def test_help_and_compare_load_no_torch(tmp_path):
    results.save(RESULTS, tmp_path / "a.json")
    code = (
        "import sys\nfrom mvdream_fast import benchmark\nfrom mvdream_fast.core import cli\n"
        "try:\n    cli.run(benchmark.main, benchmark.Flags, prog='benchmark', argv=sys.argv[1:])\n"
        "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules)\n"
    )
    for argv in (["--help"], ["compare", "a.json", "a.json"]):
        line = [sys.executable, "-c", code, *argv]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "0 False", done.stderr


def test_the_committed_pages_are_of_the_committed_files():
    """`python -m mvdream_fast.benchmark page benchmarks/results/*.json` writes them anew."""
    from mvdream_fast.benchmarking.page import page

    for path in sorted((ROOT / "benchmarks/results").glob("*.html")):
        assert path.read_text() == page(results.load(path.with_suffix(".json"))), path.name


def test_the_tables_of_the_documents_are_of_the_committed_files():
    """`python -m mvdream_fast.benchmark tables` writes them anew."""
    assert benchmark.write_tables(ROOT, check=True) == 0
