"""benchmarks/device.py: what it writes, and that one part's end is not another's. Its parts run here at toy sizes."""

import ast
import json
import subprocess
import sys
from pathlib import Path

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
