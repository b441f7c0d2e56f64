"""The Triton kernels compiled ahead of time: no spills, tensor cores in use, no growth; and what the report computes.

Compilation runs in a process of its own: in this one the kernels may be loaded for the interpreter.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from mvdream_fast.kernels import report

ROW = {
    "workload": "attention d64",
    "kernel": "attention_forward",
    "arch": 90,
    "registers": 200,
    "stack_bytes": 0,
    "shared_bytes": 65536,
    "spill_instructions": 0,
    "local_table": False,
    "tensor_cores": ["HGMMA"],
}


def run_report(*flags, check=True):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "mvdream_fast.kernels.report", *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=check)


def test_main_kernels_on_an_h100(tmp_path):
    run = run_report("--quick", "--archs", "90", "--check", "--output", str(tmp_path / "rows.json"), check=False)
    assert run.returncode == 0, run.stderr
    rows = report.load(tmp_path / "rows.json")["rows"]
    assert {r["workload"] for r in rows} == {w.name for w in report.workloads() if w.quick}
    forward = next(r for r in rows if r["kernel"] == "attention_forward")
    assert forward["tensor_cores"] == ["HGMMA"]
    assert forward["flops"] == 4 * 4 * 5 * 4096**2 * 64  # four scenes, five heads, two products of 4096 x 4096 x 64


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", ["80", "90", "100", "120"])
def test_every_kernel_on_every_architecture(arch):
    run = run_report("--archs", arch, "--check", check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sizes_of_one_and_beyond_2_to_the_31_compile():
    # Triton makes a constant of an integer that is 1, and the interpreter does not: only the compiler finds its misuse.
    code = """if True:
        from mvdream_fast.kernels import report
        for row in report.compiled((90,), "", False, report.extremes):
            print(row["workload"])"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    assert set(run.stdout.splitlines()) == {w.name for w in report.extremes()}


def test_the_kept_file_covers_every_workload_and_architecture():
    kept = report.load()
    assert set(map(int, kept["gpus"])) == set(report.GPUS)
    expected = {(w.name, arch) for w in report.workloads() for arch in report.GPUS}
    assert {(r["workload"], r["arch"]) for r in kept["rows"]} == expected
    assert report.problems(kept["rows"], kept["rows"]) == []
    assert "predicted" in kept["times"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"spill_instructions": 2}, "2 spill instructions in a forward kernel"),
        ({"tensor_cores": []}, "no tensor-core instruction"),
        ({"registers": 221}, "registers grew from 200 to 221"),
        ({"shared_bytes": 80000}, "shared_bytes grew from 65536 to 80000"),
        ({"arch": 80}, "not in gpu_static.json"),
    ],
)
def test_what_the_check_finds(change, text):
    assert [text in found for found in report.problems([ROW | change], [ROW])] == [True]


def test_what_the_check_lets_pass():
    assert report.problems([ROW | {"registers": 220}], [ROW]) == []
    backward = {"kernel": "attention_backward_q", "spill_instructions": 9}
    assert report.problems([ROW | backward], [ROW | backward]) == []


def test_occupancy_by_hand():
    gpu = report.GPUS[90]
    # 168 registers x 32 threads = 5376, 21504 a block of four warps: three blocks fit, 12 of 64 warps.
    assert report.occupancy(gpu, registers=168, shared=1024, warps=4) == 12 / 64
    assert report.occupancy(gpu, registers=32, shared=100 * 1024, warps=4) == 8 / 64  # two blocks by shared memory
    assert report.occupancy(gpu, registers=32, shared=0, warps=4) == 1


def test_a_pointer_passed_twice_is_moved_once():
    x, y = torch.empty(10, dtype=torch.float16), torch.empty(3)
    assert report.moved({"x": x, "again": x, "y": y, "n": 5}) == 20 + 12


def test_help_needs_no_torch():
    code = "import sys; import mvdream_fast.kernels.report; sys.exit('torch' in sys.modules or 'triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_architecture_is_an_argument_error():
    assert run_report("--archs", "75", check=False).returncode == 2


def test_the_kept_file_is_one_row_a_line():
    lines = report.BASELINE.read_text().splitlines()
    assert len(lines) == len(json.loads(report.BASELINE.read_text())["rows"]) + 2
