"""Four views from the embedded model while the same is going on beside it: what two commands on one machine cost.

Each measurement starts processes, as commands are: alone and in pairs, with OpenMP's own spinning and with that of
`mvdream_fast.core.cli.share_cores`. A table of milliseconds a step at the end.
"""

import os
import subprocess
import sys

import pytest

from mvdream_fast.core.cli import SPIN_COUNT

N_STEPS, ROUNDS = 20, 3
SPINNING = {"libgomp's": {}, "ours": {"GOMP_SPINCOUNT": SPIN_COUNT}}
PIPELINE = """
import sys, time
from mvdream_fast import MVDreamPipeline
pipeline = MVDreamPipeline.from_pretrained("embedded")
n_steps, rounds = int(sys.argv[1]), int(sys.argv[2])
"""
MEASURE = """
seconds = []
for seed in range(rounds + 1):  # the first one warms up
    start = time.perf_counter()
    pipeline("a red armchair", n_steps=n_steps, seed=seed)
    seconds.append(time.perf_counter() - start)
print(min(seconds[1:]) / n_steps)
"""
KEEP_GOING = """
while True:
    pipeline("a red armchair", n_steps=n_steps, seed=0)
"""
_best: dict[tuple[str, int], float] = {}


def start(program: str, environment: dict[str, str]) -> subprocess.Popen:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP", "OMP"))}
    line = [sys.executable, "-c", PIPELINE + program, str(N_STEPS), str(ROUNDS)]
    return subprocess.Popen(line, env=inherited | environment, text=True, stdout=subprocess.PIPE)


@pytest.mark.parametrize("n_programs", [1, 2])
@pytest.mark.parametrize("spinning", list(SPINNING))
def bench_step_beside_others(benchmark, spinning, n_programs):
    def measure() -> float:
        others = [start(KEEP_GOING, SPINNING[spinning]) for _ in range(n_programs - 1)]
        try:
            return float(start(MEASURE, SPINNING[spinning]).communicate()[0])
        finally:
            for other in others:
                other.kill()
                other.communicate()

    benchmark.group = f"{n_programs} at once"
    _best[spinning, n_programs] = benchmark.pedantic(measure, rounds=1)


@pytest.fixture(scope="module", autouse=True)
def _table(request):
    yield
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        for (spinning, n_programs), seconds in _best.items():
            print(f"\n{n_programs} at once, {spinning:9} spinning: {1e3 * seconds:6.1f} ms a step", end="")
        print()
