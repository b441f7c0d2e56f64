"""The field on the paper's grid: the machine's limit, plain torch eager and compiled, and ours, all in one run.

Nanoseconds a sample; forward and forward+backward apart. The limit is a bare level-major gather plus the bare
multiply-adds of both networks (machine_limit.cpp). Ratios of this run alone are printed at the end.
"""

import json
import os
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest
import torch
from reference.memory import peak_memory, settled_memory

from mvdream_fast import ops
from mvdream_fast.field.volume import Volume, VolumeConfig

ROOT = Path(__file__).resolve().parents[1]
THREADS = min(2, os.cpu_count() or 1)
N_SAMPLES = 1 << 20
N_EAGER = 1 << 16  # plain torch keeps kilobytes a sample for its backward pass
_ns: dict[str, float] = {}


@pytest.fixture(scope="module")
def volume():
    return Volume(VolumeConfig.paper())


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def measure(benchmark, name, call, n_samples, rounds=5):
    """Records the median time of a call, in nanoseconds a sample, after one to warm up."""
    call()
    benchmark.pedantic(call, rounds=rounds)
    _ns[name] = statistics.median(benchmark.stats.stats.data) / n_samples * 1e9
    benchmark.extra_info["ns_per_sample"] = _ns[name]


@pytest.mark.parametrize(("n_threads", "n_samples"), [(1, None), (THREADS, None), (THREADS, 10**4)])
def bench_limit(benchmark, tmp_path, n_threads, n_samples):
    """The bare gather and the bare multiply-adds; the program takes the best of its own tries.

    With 10^4 samples a call every level is fetched from memory for few samples, which no program can avoid.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or pytest.skip("needs a C++ compiler")
    source, program = ROOT / "benchmarks/machine_limit.cpp", tmp_path / "machine_limit"
    flags = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-Wno-psabi", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(program)], check=True)

    def run():
        command = [program, str(n_threads), *([str(n_samples)] if n_samples else [])]
        return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)

    limit = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info |= limit
    _ns[f"limit, {n_threads} threads{', 10^4 samples' if n_samples else ''}"] = limit["limit_ns"]


def field_call(volume, kind, backward):
    """(a call of the field on random points, its number of samples) for one contestant."""
    n_samples = N_SAMPLES if kind == "ours" else N_EAGER
    generator = torch.Generator().manual_seed(0)
    positions = torch.rand(n_samples, 3, generator=generator) * 2 - 1
    cotangents = torch.randn(n_samples, generator=generator), torch.randn(n_samples, 3, generator=generator)
    field = {"ours": ops.field, "eager": ops.field_ref, "compiled": torch.compile(ops.field_ref)}[kind]
    density, features = [*volume.density_weights], [*volume.feature_weights]

    def forward():
        with torch.no_grad():
            field(positions, volume.table, density, features, volume.spec)

    def forward_backward():
        volume.zero_grad()
        torch.autograd.backward(field(positions, volume.table, density, features, volume.spec), cotangents)

    return forward_backward if backward else forward, n_samples


@pytest.mark.parametrize("kind", ["eager", "compiled", "ours"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.timeout(1200)
def bench_field(benchmark, volume, kind, backward):
    benchmark.group = "field forward+backward" if backward else "field forward"
    if kind == "compiled" and os.environ.get("MVDREAM_FAST_BENCH_COMPILED") != "1":
        pytest.skip("compiling 16 unrolled levels takes minutes; set MVDREAM_FAST_BENCH_COMPILED=1")
    call, n_samples = field_call(volume, kind, backward)
    measure(benchmark, f"{kind} {benchmark.group}", call, n_samples, rounds=5 if kind == "ours" else 3)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def bench_one_thread(benchmark, volume, threads, backward):
    benchmark.group = "field forward+backward" if backward else "field forward"
    threads(1)
    measure(benchmark, f"one thread {benchmark.group}", *field_call(volume, "ours", backward), rounds=3)


@pytest.mark.parametrize("exponent", [4, 5, 6, 7])
def bench_samples(benchmark, volume, exponent):
    """Linear in the samples: nanoseconds a sample of the forward pass from 10^4 to 10^7."""
    benchmark.group = "field forward, by samples"
    positions = torch.rand(10**exponent, 3) * 2 - 1

    def call():
        with torch.no_grad():
            volume(positions)

    measure(benchmark, f"10^{exponent} samples", call, 10**exponent, rounds=3 if exponent > 6 else 5)


def bench_memory(benchmark, volume):
    """Peak of a training step beyond parameters, their gradients, inputs and outputs, in bytes a sample."""
    call, n_samples = field_call(volume, "ours", backward=True)
    call()
    volume.zero_grad()
    before = settled_memory()
    benchmark.pedantic(call, rounds=1)
    gradients = sum(p.numel() * 4 for p in volume.parameters())
    extra = (peak_memory() - before - gradients) / n_samples
    benchmark.extra_info["bytes_per_sample"] = _ns["memory"] = extra


@pytest.fixture(scope="module", autouse=True)
def _ratios(request):
    """Prints what was measured and how ours stands to the limit and to plain torch."""
    yield
    lines = [f"{name:36} {value:10.1f} {'B' if name == 'memory' else 'ns'}/sample" for name, value in _ns.items()]
    for label, above, below in [
        ("share of the machine's limit, forward", f"limit, {THREADS} threads", "ours field forward"),
        ("speed against eager, forward", "eager field forward", "ours field forward"),
        ("speed against eager, forward+backward", "eager field forward+backward", "ours field forward+backward"),
        ("speed against compiled, forward", "compiled field forward", "ours field forward"),
        ("speed against compiled, fwd+bwd", "compiled field forward+backward", "ours field forward+backward"),
        (f"{THREADS} threads against one, forward", "one thread field forward", "ours field forward"),
        (f"{THREADS} threads against one, fwd+bwd", "one thread field forward+backward", "ours field forward+backward"),
        ("cost a sample, 10^4 against 10^7", "10^4 samples", "10^7 samples"),
        ("share of the limit at 10^4", f"limit, {THREADS} threads, 10^4 samples", "10^4 samples"),
    ]:
        if above in _ns and below in _ns:
            lines.append(f"{label:38} {_ns[above] / _ns[below]:6.2f}x")
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print("", *lines, sep="\n")
