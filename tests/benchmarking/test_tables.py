"""Numbers as they are written, Markdown tables, and the blocks of documents that hold them."""

import dataclasses
import re

import pytest
from sample_results import BACKWARD, FIELD, GEGLU, MARCH, RESULTS

from mvdream_fast.benchmarking import figures, results, tables
from mvdream_fast.benchmarking.results import Goal
from mvdream_fast.core.errors import InputFileError


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0.0, "0"),
        (0.01234, "0.0123"),
        (1.0, "1.00"),
        (9.996, "10.0"),
        (99.96, "100"),
        (1234.0, "1,230"),
        (0.5, "0.500"),
    ],
)
def test_numbers_have_three_digits(value, written):
    assert figures.number(value) == written


@pytest.mark.parametrize(
    ("value", "written"),
    [(15.0, "15.0 s"), (1.0, "1.00 s"), (0.9999, "1.00 s"), (0.1, "100 ms"), (6.7e-3, "6.70 ms"), (26e-6, "26.0 us"),
     (1.76e-7, "176 ns"), (3e-10, "0.300 ns")],
)  # fmt: skip
def test_durations_have_the_unit_that_suits_them(value, written):
    assert figures.seconds(value) == written


def test_shares_amounts_and_goals():
    assert [figures.share(x) for x in (0.002, 0.031, 0.5, 1.12)] == ["0.2 %", "3.1 %", "50 %", "112 %"]
    assert [figures.amount(x) for x in (10000, 1e6, 0.25)] == ["10,000", "1,000,000", "0.250"]
    assert figures.reached(Goal("memory", 64, 47.04, "B", True)) == "47.0 B"


def test_a_contest_as_a_table():
    table = """\
| contestant | time | spread | ours against it | peak memory | GFLOP/s | GB/s | of the machine's limit |
| --- | --- | --- | --- | --- | --- | --- | --- |
| reference | 4.00 ms | 5 % | 2.00x | 64 MB | 2.00 | 3.00 | 15 % |
| torch.compile | 2.50 ms | 4 % | 1.25x | 48 MB | 3.20 | 4.80 | 24 % |
| ours | 2.00 ms | 5 % |  | 48 MB | 4.00 | 6.00 | 30 % |
"""
    assert tables.contestants(GEGLU) == table


def test_columns_that_nobody_fills_are_left_out():
    assert tables.contestants(MARCH).splitlines() == [
        "| contestant | time | spread | of the machine's limit |",
        "| --- | --- | --- | --- |",
        "| ours | 500 ms | 2 % | 50 % |",
    ]


def test_several_contests_have_a_row_each():
    assert tables.overview([GEGLU, BACKWARD]).splitlines() == [
        "| contest | reference | torch.compile | ours | peak memory of ours | its share of the machine's limit |",
        "| --- | --- | --- | --- | --- | --- |",
        "| geglu (2048, 1024) forward | 4.00 ms, 2.00x | 2.50 ms, 1.25x | 2.00 ms | 48 MB | 30 % |",
        "| geglu (2048, 1024) forward+backward | 8.00 ms, 1.60x |  | 5.00 ms |  | 40 % |",
    ]


def test_missed_goals_come_first_and_say_so():
    assert tables.goals(RESULTS.contests).splitlines()[2:] == [
        "| **missed** | 2.00x | speed of ours against reference: at least 2.5x | geglu (2048, 1024) forward |",
        "| met | 2.00 ms | time of ours: at most 0.003 s | geglu (2048, 1024) forward |",
    ]


def test_the_missed_ones_alone():
    assert tables.block(RESULTS, "missed", "page.md").splitlines()[2:] == [
        "| 2.00x | speed of ours against reference: at least 2.5x | geglu (2048, 1024) forward |",
        "",
        "Goals that were met: 1.",
    ]
    assert tables.missed([MARCH]) == "None.\n\nGoals that were met: 0.\n"


def test_scaling_has_a_row_for_each_amount():
    assert tables.scaling(FIELD).splitlines() == [
        "field forward:",
        "",
        "| samples | reference | ours |",
        "| --- | --- | --- |",
        "| 10,000 | 60.0 ms | 2.00 ms |",
        "| 1,000,000 |  | 170 ms |",
    ]


def test_a_block_says_who_is_left_out_and_what_makes_it():
    lines = tables.block(RESULTS, "geglu*", "page.md").splitlines()
    assert lines[-3:] == [
        "Not run here: xformers (needs a GPU).",
        "",
        "`pytest benchmarks/bench_geglu.py --benchmark-only`, 2026-11-29, commit 0123456789.",
    ]
    assert sum("forward+backward" in line for line in lines) == 1
    assert "**missed**" in "\n".join(lines)


def test_the_command_of_long_ones_names_them():
    slow = dataclasses.replace(RESULTS, command="python -m mvdream_fast.benchmark run --slow")
    assert tables.command(slow, [GEGLU, MARCH]) == (
        'pytest benchmarks/bench_geglu.py benchmarks/bench_render.py --benchmark-only -m "slow or not slow"'
    )


def test_a_block_of_the_machine():
    text = " ".join(tables.block(RESULTS, "machine", "page.md").split())
    assert text == (
        "A CPU, 2 cores, AVX2, 2 threads, 8 GB of memory; python 3.11.2, torch 2.13.0. `make bench`, 2026-11-29, "
        "commit 0123456789. The machine's limit in that run: multiply-adds 100 GFLOP/s, copying 20.0 GB/s, gathering "
        "from a hash table 5.00 GB/s."
    )
    assert tables.block(dataclasses.replace(RESULTS, changed=True), "machine", "").count("0123456789 with changes") == 1


def test_blocks_of_a_document_are_written_anew(tmp_path):
    results.save(RESULTS, tmp_path / "a.json")
    old = "# A page\n\n<!-- results: a.json march* -->\nold\n<!-- end -->\nNot of a block: 12 ms.\n"
    new = tables.fill(old, tmp_path, "page.md")
    assert new == old.replace("old\n", tables.block(RESULTS, "march*", "page.md"))
    assert tables.fill(new, tmp_path, "page.md") == new
    assert "500 ms" not in tables.without_blocks(new)
    assert "12 ms" in tables.without_blocks(new)
    assert tables.without_blocks(new).count("\n") == new.count("\n")  # so that lines keep their numbers


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<!-- results: a.json march* -->\nno end", "page.md: a block that begins .* has no `<!-- end -->`"),
        (
            "<!-- results: a.json gone -->\n<!-- end -->",
            "page.md: no contest of a-cpu.* 'gone'; there are: field forward;",
        ),
        ("<!-- results: b.json machine -->\n<!-- end -->", "cannot read .*b.json: No such file"),
    ],
)
def test_blocks_that_cannot_be_filled(tmp_path, text, says):
    results.save(RESULTS, tmp_path / "a.json")
    with pytest.raises(InputFileError, match=says):
        tables.fill(text, tmp_path, "page.md")


def test_what_a_table_shows_is_known():
    """The figures that a page may quote are those of the table, written as there."""
    assert list(figures.shown(GEGLU)) == ["4.00 ms", "2.00x", "2.50 ms", "1.25x", "2.00 ms", "2.00x", "2.00 ms"]
    table = tables.block(RESULTS, "*", "page.md")
    for contest in RESULTS.contests:
        assert all(re.search(rf" {re.escape(figure)}[ ,]", table) for figure in figures.shown(contest))
