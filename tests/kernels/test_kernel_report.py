"""The Triton kernels compiled ahead of time: no forward spills, the right tensor cores; and what the report computes.

Compilation runs in a process of its own: in this one the kernels may be loaded for the interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_report import rates, report, workloads

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
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
    "instructions": 1000,
    "shared_loads": 100,
    "order": "product 8, exp2 60, wait, exp2 8, product 8, wait",
    "exp2_meanwhile": 60,
    "precision": "float16",
    "occupancy": 0.125,
}


def run_report(*flags, check=True):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCHMARKS / "kernel_report"), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=check)


def test_main_kernels_on_an_h100(tmp_path):
    run = run_report("--quick", "--archs", "90", "--check", "--output", str(tmp_path / "rows.json"), check=False)
    assert run.returncode == 0, run.stderr
    rows = report.load(tmp_path / "rows.json")["rows"]
    assert {r["workload"] for r in rows} == {w.name for w in workloads.workloads() if w.quick}
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
        from kernel_report import report, workloads
        for row in report.compiled((90,), "", False, workloads.extremes):
            print(row["workload"])"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=BENCHMARKS)
    assert run.returncode == 0, run.stderr[-3000:]
    assert set(run.stdout.splitlines()) == {w.name for w in workloads.extremes()}


def test_the_kept_file_covers_every_workload_and_architecture():
    kept = report.load()
    assert set(map(int, kept["gpus"])) == set(rates.GPUS)
    expected = {(w.name, arch) for w in workloads.workloads() for arch in rates.GPUS}
    assert {(r["workload"], r["arch"]) for r in kept["rows"]} == expected
    assert report.problems(kept["rows"], kept["rows"]) == []
    assert "predicted" in kept["times"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"spill_instructions": 2}, "2 spill instructions in a forward kernel"),
        ({"spill_instructions": 2, "local_table": True}, "2 spill instructions in a forward kernel"),
        ({"tensor_cores": []}, "no tensor-core instruction"),
        ({"tensor_cores": ["HMMA"]}, "fell back from HGMMA to HMMA"),
        ({"arch": 100}, "fell back from UTCHMMA to HGMMA"),
        ({"shared_bytes": 233472}, "a block of 233472 bytes of shared memory cannot start, the limit is 232448"),
        ({"occupancy": 0.0}, "cannot start"),
    ],
)
def test_what_the_check_finds_even_if_it_was_kept(change, text):
    assert [text in found for found in report.problems([ROW | change], [ROW | change])] == [True]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"registers": 221}, "registers grew from 200 to 221"),
        ({"shared_bytes": 80000}, "shared_bytes grew from 65536 to 80000"),
        ({"instructions": 1101}, "instructions grew from 1000 to 1101"),
        ({"shared_loads": 111}, "shared_loads grew from 100 to 111"),
        ({"exp2_meanwhile": 50}, "exponentials during products fell from 60 to 50"),
        ({"workload": "attention d65"}, "not in gpu_static.json"),
    ],
)
def test_what_the_check_finds_by_comparison(change, text):
    assert [text in found for found in report.problems([ROW | change], [ROW])] == [True]


@pytest.mark.parametrize("kernel", ["dense", "dense_backward_weight", "dense_backward_weight 2"])
def test_small_matrix_kernels_need_tensor_cores_too(kernel):
    row = ROW | {"workload": "embedding", "kernel": kernel, "tensor_cores": []}
    assert ["no tensor-core instruction" in x for x in report.problems([row], [row])] == [True]
    assert report.problems([row | {"precision": "float32"}], [row]) == []


@pytest.mark.parametrize(
    ("workload", "kernel", "passes"),
    [
        ("attention d160 camera", "attention_backward_kv", True),
        ("attention d64 tf32", "attention_backward_q", True),
        ("attention d64 tf32", "attention_forward", False),
        ("attention d64 camera", "attention_backward_q", False),
        ("embedding", "dense 3", True),
        ("embedding", "dense_backward_weight 3", False),
    ],
)
def test_which_kernels_may_fall_back(workload, kernel, passes):
    row = ROW | {"workload": workload, "kernel": kernel, "tensor_cores": ["HMMA"]}
    assert (report.problems([row], [row]) == []) is passes
    assert report.problems([row | {"arch": 80}], [row | {"arch": 80}]) == []  # there it is the only one
    if passes:  # the list holds nothing that is not so
        slow = [r for r in report.load()["rows"] if (r["workload"], r["kernel"]) == (workload, kernel)]
        assert all(r["tensor_cores"] == ["HMMA"] for r in slow)
        assert slow


def test_growth_of_known_spills_is_found():
    kept = ROW | {"kernel": "attention_backward_q", "spill_instructions": 100}
    assert report.problems([kept | {"spill_instructions": 110}], [kept]) == []
    found = report.problems([kept | {"spill_instructions": 111}], [kept])
    assert found == ["attention d64/attention_backward_q sm_90: spill_instructions grew from 100 to 111"]


def test_spills_are_told_from_the_table_of_sin_and_cos():
    code = """
        /*0f90*/                   STL [R1], R12 ;
        /*0fa0*/                   STL [R2], R12 ;
        /*0fb0*/              @!P0 LDL.LU R2, [R14+0x14] ;
        /*1530*/                   STL [R1+0x18], R14 ;
        /*1050*/                   LDL.64 R4, [R1+0x20] ;
        /*1060*/                   STS [R1+0x20], R4 ;"""
    assert report.spills(code) == 5
    assert report.spills(code, local_table=True) == 1


def test_the_order_of_products_and_exponentials_is_read():
    code = """
        /*0f90*/                   HGMMA.64x64x16.F32 R24, R4, gdesc[UR8] ;
        /*0fa0*/                   HGMMA.64x64x16.F32 R24, R8, gdesc[UR8], gsb0 ;
        /*0fb0*/                   MUFU.EX2 R2, R14 ;
        /*0fc0*/                   MUFU.RCP R3, R14 ;
        /*0fd0*/               @P0 MUFU.EX2 R4, R14 ;
        /*0fe0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0ff0*/                   MUFU.EX2 R5, R14 ;"""
    assert report.order_of(code) == "product 2, exp2 2, wait, exp2 1"
    assert report.exp2_meanwhile(report.order_of(code)) == 2
    assert report.exp2_meanwhile("product 8, wait, exp2 68, product 8, wait") == 0
    assert report.exp2_meanwhile("") == 0


@pytest.mark.parametrize("kernel", ["attention_forward", "attention_backward_kv", "attention_backward_q"])
def test_exponentials_run_during_products_on_an_h100(kernel):
    (row,) = (r for r in report.load()["rows"] if report.key(r) == ("attention d64", kernel, 90))
    assert row["exp2_meanwhile"] >= 16  # half of those in a loop over 64 x 64 scores, by each of 128 threads


def test_cards_with_99_kb_a_block_get_smaller_tiles():
    # The interpreter has no device: the tiles are chosen by the number, and compiled for sm_120 above.
    code = """if True:
        import itertools
        from mvdream_fast.kernels import cross_view_attention as k
        for d in (16, 32, 64, 128, 256):
            for size in (2, 4):
                for c in (86, 89, 121):
                    assert k.backward_tile(d, size, c) == k.backward_tile(d, size, 120)
                    for layout in itertools.product((True, False), repeat=3):
                        assert k.forward_tile(d, size, c, *layout) == k.forward_tile(d, size, 120, *layout)
        assert k.forward_tile(256, 2, 86, True, True, True) != k.forward_tile(256, 2, 80, True, True, True)"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=BENCHMARKS)
    assert max(r["shared_bytes"] for r in report.load()["rows"] if r["arch"] == 120) <= 101376


def test_what_the_check_lets_pass():
    assert report.problems([ROW | {"registers": 220}], [ROW]) == []
    backward = {"kernel": "attention_backward_q", "spill_instructions": 9}
    assert report.problems([ROW | backward], [ROW | backward]) == []


def attention_launch(**change):
    """One head of one scene of two views of 512 tokens, without cameras."""
    q = torch.empty(2, 512, 1, 64, dtype=torch.float16, device="meta")
    tile = {"BLOCK_D": 64, "BLOCK_M": 128, "BLOCK_N": 64, "EVEN": True, "CAMERA_K": False, "CAMERA_V": False}
    sizes = {"q": q, "out": q, "views": 2, "tokens": 512, "heads": 1, "D": 64, "PRECISION": "ieee"}
    return sizes | tile | change


def test_predicted_parts_by_hand():
    gpu, scores = rates.GPUS[90], 1024**2
    parts = rates.seconds(gpu, "attention_forward", attention_launch(), ["HGMMA"])
    assert parts["products"] == pytest.approx(scores * 4 * 64 / 989e12)
    assert parts["exp2"] == pytest.approx(scores / (16 * 132 * 1.83e9))
    assert parts["float32"] == pytest.approx(scores * (4 + 1) / 33.5e12)  # an accumulator of 64 once in 64 keys
    with_cameras = attention_launch(CAMERA_K=True, CAMERA_V=True)
    parts = rates.seconds(gpu, "attention_forward", with_cameras, ["HGMMA"])
    assert parts["float32"] == pytest.approx(scores * (4 + 1 + 3) / 33.5e12)


@pytest.mark.parametrize(
    ("dtype", "setting", "cores", "rate"),
    [
        ("float16", "ieee", ["HGMMA"], 989e12),
        ("float16", "ieee", ["HMMA"], 0.6 * 989e12),
        ("float32", "tf32", ["HGMMA"], 494.5e12),
        ("float32", "tf32", ["HMMA"], 0.6 * 494.5e12),
        ("float32", "ieee", [], 67e12),
    ],
)
def test_products_are_priced_at_their_own_rate(dtype, setting, cores, rate):
    q = torch.empty(2, 512, 1, 64, dtype=getattr(torch, dtype), device="meta")
    launch = attention_launch(q=q, out=q, PRECISION=setting)
    parts = rates.seconds(rates.GPUS[90], "attention_forward", launch, cores)
    assert parts["products"] == pytest.approx(1024**2 * 4 * 64 / rate)


def test_occupancy_by_hand():
    gpu = rates.GPUS[90]
    # 168 registers x 32 threads = 5376, 21504 a block of four warps: three blocks fit, 12 of 64 warps.
    assert rates.occupancy(gpu, registers=168, shared=1024, warps=4) == 12 / 64
    assert rates.occupancy(gpu, registers=32, shared=100 * 1024, warps=4) == 8 / 64  # two blocks by shared memory
    assert rates.occupancy(gpu, registers=32, shared=0, warps=4) == 1


def test_a_pointer_passed_twice_is_moved_once():
    x, y = torch.empty(10, dtype=torch.float16), torch.empty(3)
    assert rates.moved({"x": x, "again": x, "y": y, "n": 5}) == 20 + 12


def test_help_needs_no_torch():
    code = "import sys; import kernel_report.report; sys.exit('torch' in sys.modules or 'triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=BENCHMARKS)


def test_its_help_names_the_command_that_exists():
    assert run_report("--help").stdout.startswith("usage: python benchmarks/kernel_report ")


def test_unknown_architecture_is_an_argument_error():
    assert run_report("--archs", "75", check=False).returncode == 2


def test_the_kept_file_is_one_row_a_line():
    lines = report.BASELINE.read_text().splitlines()
    assert len(lines) == len(json.loads(report.BASELINE.read_text())["rows"]) + 2
