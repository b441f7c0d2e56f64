"""No page quotes a figure of speed without its origin.

A figure is a number with a unit of time or of a rate, or a factor: 12 ms, 176 ns a sample, 0.9 s/step, 1.37x, 30 to 70
times as fast. Between the marks of a results file it is generated. Anywhere else benchmarks/results/quoted.json names
it under its page, as often as the page does, with one of

- `command`, `machine` and `date`: what made it, where, and when it came to the page; the command ends in
  `, at commit 0123abc` where it is no longer what it was;
- `held_by`: the results file and its contest, or the page, that shows this very figure;
- `because`: why it is nobody's measurement: a goal, a setting, a prediction.

`"figures": "all"` stands for every figure of a page that is wholly of one origin.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
from test_documents import DOCUMENTS, ROOT, strangers

from mvdream_fast.benchmarking import figures, results, tables

PAGES = {str(page.relative_to(ROOT)): page for page in DOCUMENTS if page.name != "CHANGELOG.md"}  # which is of its day
FOLDER = ROOT / "benchmarks/results"
QUOTED = json.loads((FOLDER / "quoted.json").read_text())

NUMBER, PLAIN = r"\d[\d,]*(?:\.\d+)?", r"\d+(?:\.\d+)?"
LIST = rf"{PLAIN}(?:(?:,|\sand|\sor|\sto|\sagainst)\s{PLAIN})+"  # 5.1, 12.0 and 58; 3.4 against 147
WORD = r"(?:s|seconds?|minutes?|hours?|[GT]?FLOP/s|[GTM]B/s|(?:images|samples|steps|rays)(?:/s| a second))"
PER = r"(?:/step| a (?:step|sample|view|call|image))?"
FIGURE = re.compile(
    rf"(?<![\w.,/-])(?:{LIST}|{NUMBER})"
    rf"(?:x(?!\w)|(?:\s?[nmu]s|\s{WORD}){PER}(?![\w/])|"
    r"\stimes\s(?:as\sfast|faster|slower))"
)


def quoted_in(text: str) -> Counter[str]:
    """The figures of a page that are written by hand; code is none, nor are a link's words hidden in its address."""
    text = tables.without_blocks(text)
    text = re.sub(r"^```.*?^```|^    .*?$|\]\([^)]*\)|\*\*", "", text, flags=re.MULTILINE | re.DOTALL)
    return Counter(" ".join(found.group().split()) for found in FIGURE.finditer(text))


def named_for(entries: list[Mapping[str, Any]], quoted: Counter[str]) -> Counter[str]:
    """What the entries of a page name, as often as they do."""
    named: Counter[str] = Counter()
    for entry in entries:
        named += quoted if entry["figures"] == "all" else Counter(entry["figures"])
    return named


def wrong(entry: Mapping[str, Any]) -> str:
    """What an entry lacks as an origin, in a sentence; empty where it is one."""
    keys = set(entry) - {"figures"}
    if keys == {"because"} and entry["because"]:
        return ""
    if keys == {"held_by"}:
        missing = [figure for figure in entry["figures"] if figure not in held(entry["held_by"])]
        return f"{entry['held_by']} does not show {', '.join(missing)}" if missing else ""
    if keys != {"command", "machine", "date"}:
        return f"an origin is command, machine and date, or held_by, or because; got {', '.join(sorted(keys))}"
    of_its_day = re.search(r", at commit [0-9a-f]{7,}$", entry["command"])
    if (unknown := strangers(entry["command"])) and not of_its_day:
        return f"the command names {', '.join(unknown)}, which the repository does not have"
    dated = re.fullmatch(r"20\d\d-\d\d-\d\d", entry["date"])
    return "" if entry["machine"] and dated else "machine and date must be given, the date as 2026-11-29"


def held(source: str) -> Counter[str]:
    """The figures that a source shows: a contest of a results file, or a page."""
    name, _, contest = source.partition(" ")
    if name.endswith(".json"):
        return Counter(figures.shown(results.load(FOLDER / name).contest(contest)))
    return quoted_in(PAGES[name].read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PAGES)
def test_every_figure_of_a_page_has_its_origin(name):
    quoted = quoted_in(PAGES[name].read_text(encoding="utf-8"))
    named = named_for(QUOTED.get(name, []), quoted)
    assert not quoted - named, f"{name} quotes these; name their origin in benchmarks/results/quoted.json"
    assert not named - quoted, f"benchmarks/results/quoted.json names these, which {name} does not quote (so often)"


@pytest.mark.parametrize("name", QUOTED)
def test_every_origin_is_one(name):
    assert name in PAGES
    assert [said for entry in QUOTED[name] if (said := wrong(entry))] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("takes 12 ms, or 0.9 s/step; 1.37x", ["12 ms", "0.9 s/step", "1.37x"]),
        ("it is **1.65** to 1.99x, 540, 265 and 178 ns a sample", ["1.65 to 1.99x", "540, 265 and 178 ns a sample"]),
        ("3.4 against 147 ms; 38.9 ms against 25.8 ms.", ["3.4 against 147 ms", "38.9 ms", "25.8 ms"]),
        ("30 to 70 times\nas fast, 414 TFLOP/s, 50 minutes", ["30 to 70 times as fast", "414 TFLOP/s", "50 minutes"]),
        ("30 to 70 times as fast, 19,000 images a second", ["30 to 70 times as fast", "19,000 images a second"]),
        ("of 192,000, 50 minutes", ["50 minutes"]),
        ("sm_90, 64 x 64, 4x64x64, 2^20 samples, the 1980s, float32, v1.3.0, 36 MB, 30 steps", []),
        ("`--seconds 16` and [a page](a.md#12-ms)\n\n    pytest 12 ms\n```\n12 ms\n```\n", []),
        ("<!-- results: a.json b -->\n12 ms\n<!-- end -->\n", []),
    ],
)
def test_what_is_a_figure(text, found):
    assert list(quoted_in(text).elements()) == found


def test_figures_are_counted():
    """A second claim of the same number needs an origin of its own."""
    assert quoted_in("12 ms here and 12 ms there") - named_for([{"figures": ["12 ms"]}], Counter()) == {"12 ms": 1}
    assert named_for([{"figures": "all"}], Counter({"12 ms": 2})) == {"12 ms": 2}


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({}, "an origin is command, machine and date"),
        ({"command": "pytest benchmarks/bench_geglu.py", "machine": "a CPU"}, "an origin is command"),
        ({"command": "pytest benchmarks/bench_gone.py", "machine": "a CPU", "date": "2026-11-29"}, "bench_gone.py"),
        ({"command": "pytest a.py, at commit 12", "machine": "a CPU", "date": "2026-11-29"}, "the command names a.py"),
        ({"command": "make bench", "machine": "a CPU", "date": "today"}, "machine and date must be given"),
        ({"because": ""}, "an origin is"),
        ({"held_by": "docs/gpu_measured.md"}, "docs/gpu_measured.md does not show 12.34 ms"),
    ],
)
def test_what_is_no_origin(entry, says):
    assert says in wrong({"figures": ["12.34 ms"], **entry})


def test_a_command_of_its_day():
    entry = {"command": "pytest a.py, at commit 0123abc", "machine": "a CPU", "date": "2026-11-29"}
    assert wrong({"figures": ["12 ms"], **entry}) == ""


def test_an_origin_that_is_a_results_file(tmp_path, monkeypatch):
    from sample_results import RESULTS

    results.save(RESULTS, tmp_path / "a.json")
    monkeypatch.setitem(held.__globals__, "FOLDER", tmp_path)
    entry = {"figures": ["1.25x", "2.00 ms"], "held_by": "a.json geglu (2048, 1024) forward"}
    assert wrong(entry) == ""
    assert "does not show 1.26x" in wrong(entry | {"figures": ["1.26x"]})
