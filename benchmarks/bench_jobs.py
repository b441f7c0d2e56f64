"""What sharing costs and what it would buy: a claim and a look at queues of 100 and 10,000 jobs, half of them done; and
the guided UNet call of the embedded model with one, two and four scenes in it, in processor time a scene.

The times of the UNet are of the process, taken in turns, so that a busy machine slows all alike; they are printed at
the end.
"""

import json
import statistics
import time
from dataclasses import asdict

import pytest

from mvdream_fast.jobs import queue as queues
from mvdream_fast.jobs.job import Event, Job, Progress
from mvdream_fast.jobs.queue import Queue
from mvdream_fast.jobs.store import open_store

SETTINGS = {f"setting_{i}": 1.5 * i for i in range(60)}  # as many as a request has
TURNS = 25
_lines: list[str] = []


@pytest.fixture(scope="module", params=[100, 10_000])
def queue(request, tmp_path_factory) -> Queue:
    """So many jobs, the first half of them done."""
    place = tmp_path_factory.mktemp("queue")
    queue = Queue(open_store(place / "out"))
    jobs = [Job("sds", {"prompt": f"prompt {i}", "sds": SETTINGS}) for i in range(request.param)]
    queue.add(*jobs)
    (place / "out/events").mkdir()
    for job in jobs[: len(jobs) // 2]:
        for number, event in ((1, "claim"), (2, "done")):
            (place / f"out/events/{job.id}.{number}").write_text(json.dumps(asdict(Event(event))))
    queue.look()
    return queue


@pytest.mark.parametrize("known", [False, True], ids=["looks", "has just looked"])
def bench_claim(benchmark, queue, monkeypatch, known):
    monkeypatch.setattr(queues, "FRESH_S", 1e9 if known else 0.0)
    benchmark.pedantic(lambda: queue.claim("w"), rounds=10)


def bench_heartbeat(benchmark, queue):
    lease = queue.claim("w")
    benchmark.pedantic(lambda: lease.heartbeat(Progress(1, 2)), rounds=10)


def bench_all_jobs(benchmark, queue):
    benchmark.pedantic(queue.jobs, rounds=5)


@pytest.fixture
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def bench_scenes(benchmark, one_thread, dtype):
    calls = _calls(dtype)
    times: dict[int, list[float]] = {n: [] for n in calls}

    def turn() -> None:
        for n, call in calls.items():
            begin = time.process_time()
            call()
            times[n].append((time.process_time() - begin) / n)

    benchmark.pedantic(turn, rounds=TURNS, warmup_rounds=1)
    alone = statistics.median(times[1])
    for n, found in times.items():
        each = statistics.median(found)
        _lines.append(f"{dtype}, {n} scenes: {1e3 * each:.1f} ms of processor time a scene, {alone / each:.2f} x")


def _calls(dtype: str) -> dict:
    """The guided call of four views by the number of scenes."""
    import torch

    from mvdream_fast.camera import get_camera
    from mvdream_fast.diffusion.denoiser import Denoiser
    from mvdream_fast.pipeline import MVDreamPipeline

    pipeline, camera = MVDreamPipeline.from_pretrained("embedded", "cpu", dtype), get_camera(4)
    side = pipeline.config.vae.image_size // pipeline.config.vae.downsampling
    latents = torch.randn(16, pipeline.config.unet.in_channels, side, side)
    text, at = pipeline.encode_prompt("a red chair").to(pipeline.dtype), torch.full((16,), 500)

    def call(n: int):
        denoiser, poses = Denoiser(pipeline.unet, text.repeat(n), 4), camera.repeat(n, 1)
        return lambda: denoiser(latents[: 4 * n], at[: 4 * n], poses)

    return {n: call(n) for n in (1, 2, 4)}


@pytest.fixture(scope="module", autouse=True)
def _print_at_the_end(request):
    yield
    if _lines:
        reporter = request.config.pluginmanager.getplugin("terminalreporter")
        reporter.write_line("\n" + "\n".join(_lines))
