"""Tetrahedra: marching them, and a step that refines them at 256 x 256 beside a step of score distillation of `mini`.

Both steps have the embedded model's shapes, with random weights, and four views. A process of its own for each, which
tells its peak memory; ratios within one run.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from bench_sds import STEPS, THREADS, WARM_UP, build, configurations

CONTESTANTS = ("mini", "refine 64", "refine 128")
_results: dict[str, dict] = {}


@pytest.mark.parametrize("resolution", [32, 64, 128])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def bench_march(benchmark, resolution, backward):
    """A ball of radius 0.7: the largest surface that a scene has."""
    import torch

    from mvdream_fast.scene.tets.lattice import Lattice, positions_of
    from mvdream_fast.scene.tets.marching import march

    torch.set_num_threads(THREADS)
    lattice = Lattice(resolution)
    points = positions_of(lattice, torch.device("cpu"))
    sdf = (points.norm(dim=1) - 0.7).requires_grad_(backward)
    deformation = torch.zeros_like(points).requires_grad_(backward)

    def run():
        surface = march(lattice, sdf, deformation)
        if backward:
            torch.autograd.grad(surface.vertices.sum(), (sdf, deformation))
        return surface

    benchmark.group = f"marching tetrahedra {'and back' if backward else ''}"
    benchmark.extra_info["faces"] = len(run().faces)
    benchmark(run)


@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.timeout(1800)
def bench_step(benchmark, name):
    """The median of a few steps of a run, after two to warm up."""
    benchmark.group = "step"

    def step():
        line = [sys.executable, __file__, name]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        _results[name] = json.loads(done.stdout.splitlines()[-1])

    benchmark.pedantic(step, rounds=1)
    benchmark.extra_info |= _results[name]


@pytest.fixture(scope="module", autouse=True)
def _ratios(request):
    """Prints, once all are through, how a refining step stands to one of `mini`."""
    yield
    lines = []
    for name, result in _results.items():
        parts = ", ".join(f"{part} {seconds:.3f}" for part, seconds in result["parts"].items())
        lines.append(
            f"{name:10} {result['step_s']:7.3f} s/step, {result['processor_s']:7.3f} of processors  "
            f"{result['peak_mb']:6.0f} MB peak  ({parts})"
        )
        if name != "mini" and "mini" in _results:
            ratios = [result[key] / _results["mini"][key] for key in ("step_s", "processor_s")]
            lines.append(f"{name:10} {ratios[0]:.2f} steps of mini, {ratios[1]:.2f} by the processors' time")
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print("", *lines, sep="\n")


def measure(name: str) -> dict:
    """In this process: seconds of a step (the median; of processors the least), its parts, and the highest memory."""
    import torch

    from mvdream_fast.core.rng import Stream
    from mvdream_fast.diffusion.denoiser import TextCond
    from mvdream_fast.diffusion.schedule import NoiseSchedule
    from mvdream_fast.distill.config import replaced
    from mvdream_fast.distill.state import RunState
    from mvdream_fast.guidance.sds import SDS, ScoreDistillation
    from mvdream_fast.scene.tets.config import TetsConfig
    from mvdream_fast.scene.tets.tets import Tets

    torch.set_num_threads(THREADS)
    model, config = configurations("mini")
    unet, vae = build(model, "ours")
    text = Stream(0, 0, "text").normal(2, model.text.context_length, model.unet.context_dim)
    schedule = NoiseSchedule.from_config(model.schedule)
    score = ScoreDistillation(unet, vae, schedule, TextCond(text[:1], text[1:]), config.guidance)
    tets = None
    if name != "mini":
        config = replaced(config, render_size=(256,))
        tets = Tets(TetsConfig(volume="mini", background="grey", tets_resolution=int(name.split()[1])))
    state = RunState(config, "a benchmark", 0, SDS(score, config.cameras), representation=tets)
    seconds, processor, parts = [], [], {}
    for step in range(WARM_UP + STEPS):
        start, busy = time.perf_counter(), time.process_time()
        record = state.step(step)
        if step >= WARM_UP:
            seconds.append(time.perf_counter() - start)
            processor.append(time.process_time() - busy)
            for part, spent in record.seconds.items():
                parts[part] = parts.get(part, 0.0) + spent / STEPS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    times = {"step_s": statistics.median(seconds), "processor_s": min(processor)}
    return times | {"peak_mb": peak, "parts": parts} | record.statistics


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
