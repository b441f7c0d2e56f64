"""benchmarks/device.py: what it writes, and that one part's end is not another's. Its parts run here at toy sizes."""

import argparse
import ast
import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "device.py"


def run(output: Path, *flags: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    line = [sys.executable, str(SCRIPT), "-o", str(output), "--cpu", *flags]
    done = subprocess.run(line, capture_output=True, text=True, timeout=240)
    lines = (output / "device.jsonl").read_text().splitlines()
    return done, [json.loads(line) for line in lines]


def test_every_part_is_a_function_and_every_limit_fits():
    assigned = [x for x in ast.parse(SCRIPT.read_text()).body if isinstance(x, ast.Assign)]
    parts = next(ast.literal_eval(x.value) for x in assigned if ast.unparse(x.targets[0]) == "PARTS")
    measured = ast.parse((ROOT / "benchmarks" / "device_parts.py").read_text())
    assert parts.keys() <= {x.name for x in measured.body if isinstance(x, ast.FunctionDef)}
    assert all(0 < seconds <= 480 for seconds in parts.values())


def test_parts_write_their_figures_and_a_log_each(tmp_path):
    done, found = run(tmp_path, "--parts", "graphs", "nerfacc")
    assert done.returncode == 0, done.stdout
    assert [x["equal"] for x in found if x["part"] == "graphs"] == [True] * 8
    assert any(x["part"] == "nerfacc" and x["what"].endswith("ours") and x["ms"] > 0 for x in found)
    assert {path.name for path in tmp_path.iterdir()} == {"device.jsonl", "graphs.log", "nerfacc.log"}


def test_a_part_that_is_out_of_time_is_said_and_the_run_fails(tmp_path):
    done, found = run(tmp_path, "--parts", "guided_step", "attention", "--seconds", "7")
    assert done.returncode == 1
    assert found == [
        {"part": "guided_step", "what": "failed", "error": "its 2 s were over"},
        {"part": "attention", "what": "failed", "error": "no time was left"},
    ]


# A part that, like `parity`, starts a process of its own; then it lasts too long, or ends before that.
STARTING = """
import pathlib, subprocess, sys, time
process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
pathlib.Path(sys.argv[-1], "pid").write_text(str(process.pid))
time.sleep(float(sys.argv[3] == "long") * 100)
"""


@pytest.fixture
def device(tmp_path, monkeypatch):
    """benchmarks/device.py as a module, whose parts are STARTING."""
    spec = importlib.util.spec_from_file_location("device_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "starting.py").write_text(STARTING)
    monkeypatch.setattr(module, "__file__", str(tmp_path / "starting.py"))
    return module


def goes_on(pid: int) -> bool:
    """Whether a process is there and no zombie, which is one that nobody has asked for its exit code."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(("name", "problem"), [("long", "its 2 s were over"), ("short", "")])
def test_what_a_part_has_started_does_not_go_on(name, problem, device, tmp_path):
    assert device.run_part(name, argparse.Namespace(output=tmp_path, cpu=True), 2) == problem
    assert not goes_on(int((tmp_path / "pid").read_text()))


def test_a_run_that_is_ended_ends_its_part(tmp_path):
    """By SIGTERM, as `timeout` does it; the part has a session of its own, which gets no signal of the run's."""
    line = [sys.executable, str(SCRIPT), "-o", str(tmp_path), "--cpu", "--parts", "guided_step"]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        end = time.monotonic() + 60
        while not (parts := children.read_text().split()) and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(1)  # until the run waits for it
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert parts
    assert not goes_on(int(parts[0]))
