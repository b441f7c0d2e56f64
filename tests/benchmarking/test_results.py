"""Results files: what is taken from pytest-benchmark, what is written, what is refused."""

import dataclasses
import json

import pytest
from sample_results import FIELD, GEGLU, MARCH, RESULTS

from mvdream_fast.benchmarking import results
from mvdream_fast.core.errors import InputFileError


def recorded(contest) -> dict:
    """A contest as benchmarks/contest.py records it: its file is pytest-benchmark's business."""
    return {key: value for key, value in dataclasses.asdict(contest).items() if key != "file"}


def pytest_json(*benchmarks) -> dict:
    return {
        "machine_info": {
            "node": "a-host-name",
            "python_version": "3.11.2",
            "mvdream_fast": {
                "cpu": "AMD EPYC 9554 64-Core Processor", "cores": 2, "capability": "AVX512", "torch_threads": 2,
                "memory_gb": 7.8, "gpu": None, "torch": "2.13.0", "versions": {"torch": "2.13.0", "numpy": "2.1.0"},
            },
        },
        "commit_info": {"id": "0123456789abcdef", "dirty": True},
        "datetime": "2026-11-29T03:30:00+00:00",
        "benchmarks": [
            {"fullname": f"benchmarks/{file}::bench_it[forward]", "extra_info": extra} for file, extra in benchmarks
        ],
    }  # fmt: skip


def test_what_pytest_wrote_becomes_results():
    shuffled = dataclasses.replace(GEGLU, rows=GEGLU.rows[::-1])
    data = pytest_json(
        ("bench_render.py", {"contest": recorded(MARCH)}),
        ("bench_overhead.py", {}),
        ("bench_geglu.py", {"contest": recorded(shuffled)}),
    )
    found = results.from_pytest(json.loads(json.dumps(data)), "make bench")
    assert found.contests == (GEGLU, MARCH)
    assert found.name == found.machine.slug == "amd-epyc-9554-2-cores-avx512"
    assert found.versions == {"python": "3.11.2", "torch": "2.13.0", "numpy": "2.1.0"}
    assert (found.commit, found.changed, found.date) == ("0123456789", True, "2026-11-29")
    assert "a-host-name" not in results.dumps(found)
    assert results.from_pytest(data, "make bench", "mine").name == "mine"


def test_a_gpu_is_in_the_name():
    machine = results.Machine("Intel(R) Xeon(R) Platinum 8480C CPU @ 2.00GHz", 16, "AVX512", 2, gpu="NVIDIA H100 80GB")
    assert machine.slug == "intel-xeon-platinum-8480c-16-cores-avx512-nvidia-h100-80gb"


def test_two_contests_of_one_name_are_told_apart():
    data = pytest_json(*[("bench_render.py", {"contest": recorded(MARCH)})] * 3)
    names = [contest.name for contest in results.from_pytest(data, "make bench").contests]
    assert names == ["march (2) forward", "march (3) forward", "march forward"]


def test_nothing_recorded_is_refused():
    with pytest.raises(InputFileError, match="no benchmark recorded a contest"):
        results.from_pytest(pytest_json(("bench_overhead.py", {})), "make bench")


def test_a_file_reads_back_as_it_was_written(tmp_path):
    path = tmp_path / "a.json"
    results.save(RESULTS, path)
    assert results.load(path) == RESULTS
    assert max(map(len, path.read_text().splitlines())) < 220
    row = '    { "name": "ours", "role": "ours", "median_s": 0.5, "spread_s": 0.01, "n": 10, "of_limit": 0.5 }'
    assert row in path.read_text().splitlines()  # a line for a contestant, without what it lacks


def test_four_digits_are_kept_of_what_was_measured():
    long = dataclasses.replace(MARCH, rows=(dataclasses.replace(MARCH.rows[0], median_s=0.123456789),))
    by_pixels = dataclasses.replace(FIELD, scaling=results.Scaling("pixels", {"ours": ((16384.0, 0.123456789),)}))
    text = results.dumps(dataclasses.replace(RESULTS, contests=(long, by_pixels)))
    assert '"median_s": 0.1235,' in text
    assert "16384.0, 0.1235" in text  # an amount of work is what it is


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": 2}, "schema must be at most 1, got 2"),
        ({"host": "x"}, "unknown key"),
        ({"commit": None}, "commit must be a string, got None"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, change, says):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(json.loads(results.dumps(RESULTS)) | change))
    with pytest.raises(InputFileError, match=f"{path}: .*{says}"):
        results.load(path)


def test_a_time_of_nothing_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(results.dumps(RESULTS).replace('"median_s": 0.5', '"median_s": 0'))
    with pytest.raises(InputFileError, match=r"contests\[3\]\.rows\[0\]\.median_s must be greater than 0"):
        results.load(path)


@pytest.mark.parametrize(
    ("key", "emptied", "place"),
    [
        ("rows", [], r"rows"),
        ("scaling", {"x": "samples", "points": {}}, r"scaling\.points"),
        ("scaling", {"x": "samples", "points": {"ours": []}}, r"scaling\.points\.ours"),
    ],
)
def test_a_contest_that_nobody_ran_is_refused(tmp_path, key, emptied, place):
    """A page could not draw it."""
    path = tmp_path / "a.json"
    data = json.loads(results.dumps(RESULTS))
    data["contests"][0][key] = emptied
    path.write_text(json.dumps(data))
    with pytest.raises(InputFileError, match=rf"contests\[0\]\.{place} must have at least 1 item"):
        results.load(path)


def test_ours_is_held_to_those_who_did_the_same():
    reference, compiled, ours = GEGLU.rows
    assert [GEGLU.lead(row) for row in GEGLU.rows] == [2.0, 1.25, None]
    assert GEGLU.beside(ours, "reference") is reference
    assert GEGLU.beside(compiled, "ours") is ours
    assert [FIELD.lead(row) for row in FIELD.rows] == [30.0, None, None]
    assert FIELD.beside(FIELD.rows[2], "reference") is None  # it was not timed at a million
    layout = dataclasses.replace(reference, name="reference, diffusers contiguous")
    assert dataclasses.replace(GEGLU, rows=(layout, ours)).lead(layout) == 2.0
    threads = [dataclasses.replace(ours, name=f"ours, {n} threads", median_s=1 / n) for n in (1, 2)]
    assert dataclasses.replace(GEGLU, rows=(layout, *threads)).lead(layout) is None  # two that may be meant
