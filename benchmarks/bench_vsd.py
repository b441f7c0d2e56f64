"""A step of variational score distillation against one of score distillation: the same recipe, model and images.

Both run in one process, a step of the one and then a step of the other, so that what else the machine does falls on
both; the processor's own seconds are beside those of the clock, as a busy machine stretches these alone. VSD asks the
model three times as SDS does once (the learner without a graph, and once there and back). The model is the embedded
one; first steps, whose volume is still full, are left out. A process of its own for each mode, whose peak is that of
both runs together.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time

import pytest

THREADS = int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1)))
STEPS = int(os.environ.get("MVDREAM_FAST_BENCH_STEPS", 10))
WARM_UP = int(os.environ.get("MVDREAM_FAST_BENCH_WARM_UP", 20))
GOAL = 3.2  # times an SDS step
MODES = ("3d", "2d")
_lines: list[str] = []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.timeout(1800)
def bench_step(benchmark, mode):
    """Medians of as many steps of each."""
    benchmark.group = "vsd step"
    result = {}

    def run():
        done = subprocess.run([sys.executable, __file__, mode], capture_output=True, text=True, check=True)
        result.update(json.loads(done.stdout.splitlines()[-1]))

    benchmark.pedantic(run, rounds=1)
    benchmark.extra_info |= result
    _lines.append(
        f"{mode}: SDS {result['sds_s']:.3f} s/step, VSD {result['vsd_s']:.3f} s/step, {result['ratio']:.2f}x, "
        f"{result['cpu_ratio']:.2f}x of the processor's seconds (goal at most {GOAL}x); both "
        f"{result['peak_mb']:.0f} MB peak; load {result['load']:.1f}"
    )


@pytest.fixture(scope="module", autouse=True)
def _ratios(request):
    """Prints, once all are through, what a step of VSD takes of SDS: ratios within this run only."""
    yield
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print("", *_lines, sep="\n")


def measure(mode: str) -> dict:
    """In this process: seconds of a step of each, their ratio step by step, and the process' high-water mark."""
    import torch

    from mvdream_fast.distill.config import replaced
    from mvdream_fast.distill.loop import new_guidance
    from mvdream_fast.distill.state import RunState
    from mvdream_fast.distill.systems import mini
    from mvdream_fast.pipeline import MVDreamPipeline

    torch.set_num_threads(THREADS)
    pipeline, prompt = MVDreamPipeline.from_pretrained("embedded", "cpu", "float32"), "a green armchair"
    states = {}
    for kind in ("sds", "vsd"):
        config = replaced(mini(), loss="sds", kind=kind, mode=mode)
        states[kind] = RunState(config, prompt, 0, new_guidance(pipeline, prompt, config, 0))
    wall, own = ({kind: [] for kind in states} for _ in range(2))
    for step in range(WARM_UP + STEPS):
        for kind, state in states.items():
            start, own_start = time.perf_counter(), time.process_time()
            state.step(step)
            if step >= WARM_UP:
                wall[kind].append(time.perf_counter() - start)
                own[kind].append(time.process_time() - own_start)
    ratio, cpu_ratio = (statistics.median(b / a for a, b in zip(x["sds"], x["vsd"], strict=True)) for x in (wall, own))
    return {
        "sds_s": statistics.median(wall["sds"]),
        "vsd_s": statistics.median(wall["vsd"]),
        "ratio": ratio,
        "cpu_ratio": cpu_ratio,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "load": os.getloadavg()[0],
    }


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
