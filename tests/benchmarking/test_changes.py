"""What got slower between two results files: ratios to each run's own reference, and nothing that may be noise."""

import dataclasses

import pytest
from sample_results import FIELD, GEGLU, MARCH, RESULTS

from mvdream_fast.benchmarking.changes import conditions, difference, report
from mvdream_fast.benchmarking.results import Contest, Results


def scaled(contest: Contest, by: float, role: str | None = None, **changes) -> Contest:
    """A contest in which everybody, or who has a role, takes so many times the time; shares of the limit follow."""
    rows = [
        dataclasses.replace(
            row, median_s=row.median_s * by, spread_s=row.spread_s * by, of_limit=row.of_limit and row.of_limit / by
        )
        if role in (None, row.role)
        else row
        for row in contest.rows
    ]
    return dataclasses.replace(contest, rows=tuple(rows), **changes)


def file(*contests: Contest, cpu: str = "A CPU") -> Results:
    return dataclasses.replace(RESULTS, contests=contests, machine=dataclasses.replace(RESULTS.machine, cpu=cpu))


def test_a_machine_that_is_slower_in_all_is_no_change():
    found = difference(file(GEGLU, FIELD), file(scaled(GEGLU, 3), scaled(FIELD, 3), cpu="another"))
    assert [(c.name, c.factor, c.by) for c in found.changes] == [
        ("ours, 10000 samples", pytest.approx(1), "reference"),
        ("ours", pytest.approx(1), "reference"),
    ]
    assert found.apart == ("field forward: ours, 1e+06 samples",)  # no reference beside it, no limit, another machine
    assert found.slower(1.0) == []


def test_ours_alone_is_slower():
    found = difference(file(GEGLU), file(scaled(GEGLU, 1.5, "ours")))
    assert [change.factor for change in found.slower(1.3)] == [pytest.approx(1.5)]
    assert found.slower(1.6) == []
    assert "slower, past the bound of 1.30x:\n  geglu (2048, 1024) forward: 1.50 times the time" in report(found, 1.3)
    assert "2.00 ms -> 3.00 ms" in report(found, 1.3)


def test_faster_is_told_too():
    text = report(difference(file(GEGLU), file(scaled(GEGLU, 0.5, "ours"))), 1.3)
    assert "faster:\n  geglu (2048, 1024) forward: 2.00 times as fast against the reference" in text


def test_without_a_reference_the_limit_is_the_measure_and_on_one_machine_seconds():
    slow = scaled(MARCH, 2)
    (change,) = difference(file(MARCH), file(slow, cpu="another")).changes
    assert (change.by, change.factor) == ("limit", pytest.approx(2))
    bare = [dataclasses.replace(c, rows=(dataclasses.replace(c.rows[0], of_limit=None),)) for c in (MARCH, slow)]
    (change,) = difference(file(bare[0]), file(bare[1])).changes
    assert (change.by, change.factor) == ("seconds", pytest.approx(2))
    assert difference(file(bare[0]), file(bare[1], cpu="another")).changes == ()


def test_another_reference_is_none():
    """A ratio to something else than before says nothing."""
    rows = tuple(dataclasses.replace(r, name="another") if r.role == "reference" else r for r in GEGLU.rows)
    (change,) = difference(file(GEGLU), file(dataclasses.replace(GEGLU, rows=rows))).changes
    assert change.by == "limit"


def test_a_change_within_its_spread_is_none():
    """Spreads by hand: half of a quarter, of each of four rows, is (4 * 0.125^2)^0.5 = 0.25."""
    wide = dataclasses.replace(
        GEGLU, rows=tuple(dataclasses.replace(row, spread_s=row.median_s / 4) for row in GEGLU.rows)
    )
    (change,) = difference(file(wide), file(scaled(wide, 1.2, "ours"))).changes
    assert change.spread == pytest.approx(0.25)
    assert change.at_least == 1
    (change,) = difference(file(wide), file(scaled(wide, 1.5, "ours"))).changes
    assert change.at_least == pytest.approx(1.2)
    text = report(difference(file(wide), file(scaled(wide, 1.2, "ours"))), 1.0)
    assert text == "1 of 1 did not move by more than their spread"


def test_what_only_one_has():
    text = report(difference(file(GEGLU), file(MARCH)), 1.3)
    assert "only in the first: geglu (2048, 1024) forward\nonly in the second: march forward" in text


def test_conditions_that_differ_are_named():
    other = dataclasses.replace(file(GEGLU, cpu="another"), versions={"python": "3.11.2", "numpy": "2.1"})
    assert conditions(RESULTS, other) == {
        "cpu": ("A CPU", "another"), "torch": ("2.13.0", "None"), "numpy": ("None", "2.1")
    }  # fmt: skip
