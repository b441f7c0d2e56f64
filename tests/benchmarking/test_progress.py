"""The line of progress, and the machine's limit, of benchmarks/."""

import subprocess
from types import SimpleNamespace

import limit
import pytest
from progress import Progress


def test_a_line_says_what_runs_and_how_long_the_rest_takes():
    clock, lines = SimpleNamespace(now=0.0), []
    progress = Progress(lines.append, 41, clock=lambda: clock.now)
    for now in (0.0, 10.0, 15.0):
        clock.now = now
        progress.pytest_runtest_logstart("benchmarks/bench_geglu.py::bench_geglu[a]", None)
    assert lines == [
        "[1 of 41] bench_geglu.py::bench_geglu[a]",
        "[2 of 41] bench_geglu.py::bench_geglu[a], about 7 min to go",
        "[3 of 41] bench_geglu.py::bench_geglu[a], about 5 min to go",
    ]
    clock.now = 20.0
    progress.n_begun = 39
    progress.pytest_runtest_logstart("x", None)
    assert lines[-1] == "[40 of 41] x, about 1 s to go"


def test_the_count_goes_on_after_another_process():
    clock, lines = SimpleNamespace(now=0.0), []
    progress = Progress(lines.append, 41, n_before=30, clock=lambda: clock.now)
    progress.pytest_runtest_logstart("a", None)
    clock.now = 5.0
    progress.pytest_runtest_logstart("b", None)
    assert lines == ["[31 of 41] a", "[32 of 41] b, about 50 s to go"]  # by what this process's cases took


def test_a_limit_is_measured_again_after_a_minute(monkeypatch):
    clock, asked = SimpleNamespace(now=1000.0), []
    monkeypatch.setattr(limit, "_measured", {})
    monkeypatch.setattr(limit.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(limit.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(limit, "_on_cpu", lambda *key: asked.append(key) or float(len(asked)))
    first = limit.machine_limit(2, {"bytes": 100_000, "gathered_samples": 7})
    assert asked == [("multiply_add", 2, 0), ("copy", 2, 131_072), ("gather", 2, 7)]
    assert first == {"multiply_add_gflop_s": 1.0, "copy_gb_s": 2.0, "gather_gb_s": 3.0}
    clock.now += 59
    assert limit.machine_limit(2, {"bytes": 131_072, "gathered_samples": 7}) == first
    assert limit.machine_limit(2, {"bytes": 1})["copy_gb_s"] == 4.0  # another size, and no smaller than 64 KB
    assert asked[-2:] == [("copy", 2, 65_536), ("gather", 2, 0)]
    clock.now += 2
    assert limit.machine_limit(2, {"bytes": 100_000, "gathered_samples": 7})["copy_gb_s"] > 5


@pytest.mark.parametrize(("kind", "size"), [("multiply_add", 0), ("copy", 1 << 16)])
def test_the_program_measures(kind, size):
    assert limit._on_cpu(kind, 1, size) > 0.01


def test_the_program_says_how_it_is_used():
    done = subprocess.run([limit._program(), "dance", "1"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: machine_limit multiply_add|copy|gather THREADS")
