"""What this machine allows at best, measured beside a contest: multiply-adds, a copy, and a gather of a hash grid.

On a CPU by machine_limit.cpp, which knows no torch; on a GPU by torch's own matrix product, copy and indexing, which
come close to it. A figure is measured again when it is a minute old: what a shared machine delivers varies.
"""

import atexit
import functools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-Wno-psabi", f"-I{ROOT / 'csrc'}")
FRESH_S = 60
SMALLEST, LARGEST = 1 << 16, 1 << 28  # bytes that are copied
_measured: dict[tuple, tuple[float, float]] = {}


def machine_limit(threads: int, work: Mapping[str, float]) -> dict[str, float]:
    """The three limits for work of this size: a copy of as many bytes, a gather of as many samples at a call.

    Args:
        threads: that share the work on a CPU.
        work: `bytes` and `gathered_samples` of it count; without them large arrays and long calls.
    """
    size = int(min(max(work.get("bytes", LARGEST), SMALLEST), LARGEST))
    samples = int(work.get("gathered_samples", 0))
    return {
        "multiply_add_gflop_s": _recent("multiply_add", threads, 0),
        "copy_gb_s": _recent("copy", threads, 1 << (size - 1).bit_length()),
        "gather_gb_s": _recent("gather", threads, samples),
    }


def least_seconds(work: Mapping[str, float], limit: Mapping[str, float]) -> float:
    """What the machine would take at best for this work.

    Arithmetic and copying go on beside each other; a gather waits for memory, and its addresses and its sums are in it.
    """
    arithmetic = work.get("flop", 0) / limit["multiply_add_gflop_s"]
    copying = work.get("bytes", 0) / limit["copy_gb_s"]
    return (max(arithmetic, copying) + work.get("gathered_bytes", 0) / limit["gather_gb_s"]) / 1e9


def _recent(kind: str, threads: int, size: int) -> float:
    key, now = (kind, threads, size), time.monotonic()
    if key not in _measured or now - _measured[key][0] > FRESH_S:
        measure = _on_gpu if torch.cuda.is_available() else _on_cpu
        _measured[key] = now, measure(kind, threads, size)
    return _measured[key][1]


def _on_cpu(kind: str, threads: int, size: int) -> float:
    done = subprocess.run([_program(), kind, str(threads), str(size)], check=True, capture_output=True)
    return json.loads(done.stdout)["g_s"]


@functools.cache
def _program() -> Path:
    """machine_limit.cpp, compiled for this machine."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler:
        raise RuntimeError("the machine's limit needs a C++ compiler: install g++, or set CXX")
    folder = Path(tempfile.mkdtemp(prefix="machine_limit"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source, program = Path(__file__).with_name("machine_limit.cpp"), folder / "machine_limit"
    subprocess.run([compiler, *FLAGS, str(source), "-o", str(program)], check=True)
    return program


def _on_gpu(kind: str, threads: int, size: int) -> float:
    """The same three of a GPU, in 10^9 a second: half precision's product, since that is what the models run in."""
    random = functools.partial(torch.randn, device="cuda", dtype=torch.float16)
    if kind == "multiply_add":
        a, b = random(8192, 8192), random(8192, 8192)
        return 2 * 8192**3 / _fastest(lambda: a @ b) / 1e9
    if kind == "copy":
        x = torch.empty(size // 2, dtype=torch.uint8, device="cuda")
        y = torch.empty_like(x)
        return size / _fastest(lambda: y.copy_(x)) / 1e9
    table = torch.randn(1 << 23, 2, device="cuda")
    rows = torch.randint(0, len(table), (128 * (size or 1 << 16),), device="cuda")
    return 8 * len(rows) / _fastest(lambda: table[rows]) / 1e9


def _fastest(call: Callable[[], object], tries: int = 10) -> float:
    times = []
    for _ in range(tries):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
