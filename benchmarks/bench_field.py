"""The field on the paper's grid: the machine's limit, plain torch eager and compiled, and ours, all in one run.

Nanoseconds a sample; forward and forward+backward apart. The limit is a bare level-major gather plus the bare
multiply-adds of both networks (machine_limit.cpp). The contestants take turns, and the fastest turn of each counts:
on a machine that others share, what memory delivers varies twofold within minutes. Ratios are printed at the end.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reference.memory import peak_memory, settled_memory

from mvdream_fast import ops
from mvdream_fast.scene.nerf.volume import Volume, VolumeConfig

ROOT = Path(__file__).resolve().parents[1]
THREADS = min(2, os.cpu_count() or 1)
pytestmark = pytest.mark.usefixtures("threads")
N_SAMPLES = 1 << 20
N_EAGER = 1 << 16  # plain torch keeps kilobytes a sample for its backward pass
_ns: dict[str, float] = {}


@pytest.fixture(scope="module")
def volume():
    return Volume(VolumeConfig.paper())


@pytest.fixture(scope="module")
def limit(tmp_path_factory):
    """A function of the threads, and perhaps of the samples of a call: the machine's limit now, in ns a sample."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or pytest.skip("needs a C++ compiler")
    source, program = ROOT / "benchmarks/machine_limit.cpp", tmp_path_factory.mktemp("limit") / "machine_limit"
    flags = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-Wno-psabi", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(program)], check=True)

    def run(*arguments: int) -> float:
        command = [program, *map(str, arguments)]
        return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["limit_ns"]

    return run


def in_turns(benchmark, ours: tuple[str, Callable, int], others: dict[str, Callable[[], float]], rounds: int) -> None:
    """Times (name, call, its samples); before each of its rounds every other contestant tells its own ns a sample."""
    name, call, n_samples = ours

    def take_turns():
        for other, measure in others.items():
            _ns[other] = min(measure(), _ns.get(other, float("inf")))

    call()  # to warm up, as the first of the others' turns is for them
    benchmark.pedantic(call, setup=take_turns, rounds=rounds)
    _ns[name] = min(benchmark.stats.stats.data) / n_samples * 1e9
    benchmark.extra_info |= {label: _ns[label] for label in (name, *others)}


def timed(call: Callable[[], object], n_samples: int) -> Callable[[], float]:
    """A contestant of `in_turns`."""

    def measure() -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) / n_samples * 1e9

    return measure


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


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.timeout(1200)
def bench_field(benchmark, volume, threads, limit, backward):
    """Ours on two threads beside itself on one, plain torch eager (and compiled), and the machine."""
    passes = benchmark.group = "forward+backward" if backward else "forward"
    call, n_samples = field_call(volume, "ours", backward)

    def on_one_thread() -> float:
        threads(1)
        nanoseconds = timed(call, n_samples)()
        threads(THREADS)
        return nanoseconds

    others = {f"one thread, {passes}": on_one_thread}
    # Compiling 16 unrolled levels takes minutes.
    for kind in ("eager", "compiled") if os.environ.get("MVDREAM_FAST_BENCH_COMPILED") == "1" else ("eager",):
        others[f"{kind}, {passes}"] = timed(*field_call(volume, kind, backward))
    if not backward:
        others |= {f"limit, {n} threads": lambda n=n: limit(n) for n in sorted({1, THREADS})}
    in_turns(benchmark, (f"ours, {passes}", call, n_samples), others, rounds=9)


def bench_samples(benchmark, volume, limit):
    """Linear in the samples: the forward pass from 10^4 to 10^7 of them.

    With 10^4 samples a call every level is fetched from memory for few samples, which no program can avoid: the limit
    for that is measured, too.
    """
    benchmark.group = "forward, by samples"

    def forward(n_samples: int) -> Callable[[], object]:
        positions = torch.rand(n_samples, 3) * 2 - 1
        return torch.no_grad()(lambda: volume(positions))

    others = {f"10^{e} samples": timed(forward(10**e), 10**e) for e in (4, 5, 6)}
    others[f"limit, {THREADS} threads, 10^4 samples"] = lambda: limit(THREADS, 10**4)
    in_turns(benchmark, ("10^7 samples", forward(10**7), 10**7), others, rounds=5)


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
    two = f"{THREADS} threads"
    for label, above, below in [
        ("share of the machine's limit, forward", f"limit, {two}", "ours, forward"),
        ("speed against eager, forward", "eager, forward", "ours, forward"),
        ("speed against eager, forward+backward", "eager, forward+backward", "ours, forward+backward"),
        ("speed against compiled, forward", "compiled, forward", "ours, forward"),
        ("speed against compiled, fwd+bwd", "compiled, forward+backward", "ours, forward+backward"),
        (f"{two} against one, forward", "one thread, forward", "ours, forward"),
        (f"{two} against one, forward+backward", "one thread, forward+backward", "ours, forward+backward"),
        ("cost a sample, 10^4 against 10^7", "10^4 samples", "10^7 samples"),
        ("cost a sample, 10^5 against 10^7", "10^5 samples", "10^7 samples"),
        ("share of the limit at 10^4", f"limit, {two}, 10^4 samples", "10^4 samples"),
    ]:
        if above in _ns and below in _ns:
            lines.append(f"{label:38} {_ns[above] / _ns[below]:6.2f}x")
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print("", *lines, sep="\n")
