"""A text-to-3D run that ends with repainting against the same run without: what each step costs in the end.

The embedded model and its recipe at full size, in one process, the two runs in turn; the ratio is of whole runs, the
steps in which the buffer is filled included.
"""

import os
import time

import pytest

THREADS = min(2, os.cpu_count() or 1)
STEPS = int(os.environ.get("MVDREAM_FAST_BENCH_STEPS", 100))
CONTESTANTS = {"distillation": 1.0, "repainting": 0.7}  # repaint_from
_seconds: dict[str, float] = {}


@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.timeout(1800)
def bench_run(benchmark, pipeline, name):
    """A whole run of `fast`, after one of a few steps to warm up."""
    from mvdream_fast.distill.recipes import resolve_config
    from mvdream_fast.text_to_3d import TextTo3D

    config = resolve_config("fast", steps=STEPS, repaint_from=CONTESTANTS[name])
    benchmark.group = "run"
    TextTo3D(pipeline)("a green armchair", config=resolve_config(config, steps=6))

    def run():
        start = time.perf_counter()
        TextTo3D(pipeline)("a green armchair", config=config)
        _seconds[name] = time.perf_counter() - start

    benchmark.pedantic(run, rounds=1)


@pytest.fixture(scope="module")
def pipeline():
    import torch

    from mvdream_fast.pipeline import MVDreamPipeline

    torch.set_num_threads(THREADS)
    return MVDreamPipeline.from_pretrained("embedded", "cpu")


@pytest.fixture(scope="module", autouse=True)
def _ratios(request):
    """Prints, once both are through, what repainting adds: a ratio within this run only."""
    yield
    if len(_seconds) == len(CONTESTANTS):
        ratio = _seconds["repainting"] / _seconds["distillation"]
        with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
            print(f"\na run of {STEPS} steps that ends with repainting: {ratio:.2f}x the time of one that does not")
