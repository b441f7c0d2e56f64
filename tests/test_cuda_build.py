"""What nvcc says of the CUDA kernels, without a GPU: no warnings, no spills where it counts, registers as recorded.

`MVDREAM_FAST_RECORD=1 pytest tests/test_cuda_build.py` writes benchmarks/cuda_static.json anew.
"""

import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu"))
RECORD = ROOT / "benchmarks/cuda_static.json"
GROWTH = 1.1
# Kernels a training step or a rendered picture spends its time in, at the default widths.
HOT = re.compile(
    r"composite_|march_|prune_|sample_positions|encode_kernel<2>|scatter_kernel<2>|(field_\w+|render)_kernel<64"
)

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
    pytest.mark.timeout(1800),
]


def kernel_name(symbol):
    """`field_forward_kernel<64,0>` of a mangled symbol."""
    name, rest = re.search(r"\d+([a-z_]+_kernel)(.*)", symbol).groups()
    arguments = re.match(r"I((?:L[ib]\d+E)+)E", rest)
    if arguments is None:
        return name
    return f"{name}<{','.join(re.findall('L[ib]([0-9]+)E', arguments[1]))}>"


def parse(log):
    """name -> what `ptxas -v` prints of it."""
    kernels, name = {}, None
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            name = kernel_name(entry[1])
        elif spills := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernels[name] = {"spill_bytes": int(spills[2]) + int(spills[3])}
        elif used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[name] |= {"registers": int(used[1]), "static_shared_bytes": int(shared[1]) if shared else 0}
    return kernels


def compile_all(arch, folder, flags=()):
    """Every kernel of csrc/cuda for one architecture; warnings are errors."""

    def compile_one(source):
        command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", *flags]
        command += ["-Werror", "all-warnings", "-I", ROOT / "csrc"]
        command += [ROOT / f"csrc/cuda/{source}.cu", "-o", folder / f"{source}.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{source} for sm_{arch}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        return parse(done.stdout + done.stderr)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return {name: kernel for kernels in pool.map(compile_one, SOURCES) for name, kernel in kernels.items()}


def check(arch, kernels, part=False):
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if os.environ.get("MVDREAM_FAST_RECORD") and not part:
        record[f"sm_{arch}"] = dict(sorted(kernels.items()))
        rows = {
            key: ",\n".join(f'  "{name}": {json.dumps(k)}' for name, k in value.items())
            for key, value in record.items()
        }
        RECORD.write_text("{\n" + ",\n".join(f' "{key}": {{\n{rows[key]}\n }}' for key in sorted(rows)) + "\n}\n")
    hot = [name for name in kernels if HOT.search(name)]
    assert len(hot) >= 12
    assert {name: kernels[name]["spill_bytes"] for name in hot if kernels[name]["spill_bytes"]} == {}
    known = record[f"sm_{arch}"]
    assert kernels.keys() <= known.keys() if part else kernels.keys() == known.keys()
    worse = {
        f"{name} {what}": (value, known[name][what])
        for name, kernel in kernels.items()
        for what, value in kernel.items()
        if value > GROWTH * known[name][what]
    }
    assert worse == {}


def test_hopper_at_the_default_width(tmp_path):
    check(90, compile_all(90, tmp_path, ["-DMVDREAM_FAST_DEFAULT_WIDTH_ONLY"]), part=True)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_every_architecture(arch, tmp_path):
    check(arch, compile_all(arch, tmp_path))


def test_the_log_is_read():
    log = """ptxas info    : Compiling entry function '_ZN4cuda20field_forward_kernelILi64ELb0EEEv' for 'sm_90'
ptxas info    : Function properties for _ZN
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem"""
    expected = {"spill_bytes": 16, "registers": 40, "static_shared_bytes": 128}
    assert parse(log) == {"field_forward_kernel<64,0>": expected}
